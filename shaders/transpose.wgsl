// This makes rows of columns, in rows that a matrix with whole blocks of columns has:
//     out[i, t] = x[t, i]      for t < count, and 0 for count <= t < STRIDE
//
// x f32 [count, SIZE]      out half [SIZE, STRIDE]
// Grid: x = vectors of four / 64, y = row of out.
override SIZE: u32;
override STRIDE: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= STRIDE / 4u { return; }
    var column = vec4(0.0);
    for (var i = 0u; i < 4u; i++) {
        let t = 4u * id.x + i;
        if t < state.count { column[i] = x[t * SIZE + id.y]; }
    }
    out[id.y * (STRIDE / 4u) + id.x] = vec4<half>(column);
}
