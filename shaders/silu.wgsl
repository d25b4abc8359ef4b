// SiLU of each token (arXiv 1702.03118):
//     out[t, i] = SCALE x[t, i] / (1 + exp(-x[t, i]))
//
// x f32 [max count, SIZE]      out half [max count, SIZE]
// SCALE, a power of two, keeps the result inside f16; the matmul that follows takes it back.
// Grid: x = vectors of four / 64, y = token.
override SIZE: u32;
override SCALE: f32;
#include "sigmoid.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    if id.x >= size || id.y >= state.count { return; }
    let v = x[id.y * size + id.x];
    out[id.y * size + id.x] = vec4<half>(v * sigmoid(v) * SCALE);
}
