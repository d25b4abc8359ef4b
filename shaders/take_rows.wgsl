// Every STRIDE-th row, and then one row again and again:
//     out[t] = x[STRIDE t]      for t < count
//     out[t] = filler[ROW]      for count <= t < rows of out
//
// x f32 [at least STRIDE (count - 1) + 1, K]      filler f32 [more than ROW, K]      out f32 [any, K]
// Grid: x = vectors of four / 64, y = row of out.
override K: u32;
override STRIDE: u32;
override ROW: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> filler: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = K / 4u;
    if id.x >= size { return; }
    var taken: vec4<f32>;
    if id.y < state.count {
        taken = x[STRIDE * id.y * size + id.x];
    } else {
        taken = filler[ROW * size + id.x];
    }
    out[id.y * size + id.x] = taken;
}
