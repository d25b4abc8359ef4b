// Two images side by side in one, of which the coarse one is enlarged; each of its pixels becomes a square of equal ones:
//     out[r, q] = fine[r, q] then coarse[r / F, q / F], with F = SIDE / COARSE_SIDE
//
// fine half [SIDE * SIDE, FINE]      coarse half [COARSE_SIDE^2, COARSE]      out half [SIDE * SIDE, FINE + COARSE]
// Grid: x = vectors of four / 64, y = pixel.
override FINE: u32;
override COARSE: u32;
override SIDE: u32;
override COARSE_SIDE: u32;

@group(0) @binding(0) var<storage, read> fine: array<vec4<half>>;
@group(0) @binding(1) var<storage, read> coarse: array<vec4<half>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = (FINE + COARSE) / 4u;
    if id.x >= size || id.y >= SIDE * SIDE { return; }
    let factor = SIDE / COARSE_SIDE;
    if id.x < FINE / 4u {
        out[id.y * size + id.x] = fine[id.y * (FINE / 4u) + id.x];
    } else {
        let pixel = id.y / SIDE / factor * COARSE_SIDE + id.y % SIDE / factor;
        out[id.y * size + id.x] = coarse[pixel * (COARSE / 4u) + id.x - FINE / 4u];
    }
}
