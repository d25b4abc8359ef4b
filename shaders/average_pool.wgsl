// The averages over squares of WINDOW x WINDOW neighbours of a square grid, which do not overlap:
//     out[r * (SIDE / WINDOW) + c] = mean over i, j < WINDOW of x[(r * WINDOW + i) * SIDE + c * WINDOW + j]
//
// x f32 [SIDE * SIDE, K], row by row of the grid      out f32 [(SIDE / WINDOW)^2, K]
// Grid: x = vectors of four / 64, y = square.
override K: u32;
override SIDE: u32;
override WINDOW: u32;

@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = K / 4u;
    let side = SIDE / WINDOW;
    if id.x >= size || id.y >= side * side { return; }
    let corner = (id.y / side * SIDE + id.y % side) * WINDOW;
    var sum = vec4(0.0);
    for (var i = 0u; i < WINDOW; i++) {
        for (var j = 0u; j < WINDOW; j++) { sum += x[(corner + i * SIDE + j) * size + id.x]; }
    }
    out[id.y * size + id.x] = sum / f32(WINDOW * WINDOW);
}
