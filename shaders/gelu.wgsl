// GELU of each token (arXiv 1606.08415), in rows that a matrix with whole blocks of columns can be multiplied by:
//     out[t, i] = SCALE gelu(x[t, i])      for i < SIZE, and 0 for SIZE <= i < STRIDE
//
// x f32 [max count, SIZE]      out half [max count, STRIDE]
// SCALE, a power of two, keeps the result inside f16; the matmul that follows takes it back.
// Grid: x = vectors of four / 64, y = token.
override SIZE: u32;
override STRIDE: u32;
override SCALE: f32;
#include "state.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= STRIDE / 4u || id.y >= state.count { return; }
    var result = vec4(0.0);
    if id.x < SIZE / 4u {
        let v = x[id.y * (SIZE / 4u) + id.x];
        result = vec4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w));
    }
    out[id.y * (STRIDE / 4u) + id.x] = vec4<half>(result * SCALE);
}
