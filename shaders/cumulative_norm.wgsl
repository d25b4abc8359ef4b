// The end of a cumulative group norm, and the ReLU after it (Universal Speech Model, as Gemma 3n has it):
//     out[t, f, c] = max(weight[c] (x[t, f, c] - running[t].mean) * running[t].scale, 0)      for t < count
//
// x f32 [max count, BANDS, CHANNELS]      running f32 [max count, 2]: mean and scale, of running_moments.wgsl
// weight f32 [CHANNELS]      out half [max count, BANDS, CHANNELS]
// Grid: x = vectors of four / 64, y = frame.
override BANDS: u32;
override CHANNELS: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> running: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let vectors = CHANNELS / 4u;
    let size = BANDS * vectors;
    if id.x >= size || id.y >= state.count { return; }
    let norm = running[id.y];
    let normed = (x[id.y * size + id.x] - norm.x) * norm.y * weight[id.x % vectors];
    out[id.y * size + id.x] = vec4<half>(max(normed, vec4(0.0)));
}
