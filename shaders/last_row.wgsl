// The vector of a chunk's last token:
//     out = x[count - 1]
//
// x f32 [max count, SIZE]      out f32 [SIZE]
// Grid: x = vectors of four / 64.
override SIZE: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    if id.x < size { out[id.x] = x[(state.count - 1u) * size + id.x]; }
}
