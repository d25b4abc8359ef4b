// GeGLU of each token of a prompt:
//     out[t, i] = SCALE gelu(gate_up[t, i]) * gate_up[t, SIZE + i]
//
// gate_up f32 [max count, 2 SIZE]      out half [max count, SIZE]
// SCALE, a power of two, keeps the product inside f16; the matmul that follows takes it back.
// Grid: x = vectors of four / 64, y = token.
override SIZE: u32;
override SCALE: f32;
#include "state.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> gate_up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    if id.x >= size || id.y >= state.count { return; }
    let gate = gate_up[id.y * 2u * size + id.x];
    let up = gate_up[(id.y * 2u + 1u) * size + id.x];
    let activated = vec4(gelu(gate.x), gelu(gate.y), gelu(gate.z), gelu(gate.w));
    out[id.y * size + id.x] = vec4<half>(activated * up * SCALE);
}
