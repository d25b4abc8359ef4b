// What a layer takes of its own input of each token (Gemma 3n, transformers' per_layer_input_gate):
//     out[t] = SCALE gelu(gate[t]) * inputs[t, layer]
//
// gate f32 [max count, SIZE]      inputs f32 [max count, LAYERS, SIZE]      out half [max count, SIZE]
// layer u32 [1]: a buffer and no constant, so that all layers have one pipeline
// SCALE, a power of two, keeps the product inside f16; the matmul that follows takes it back.
// Grid: x = vectors of four / 64, y = token.
override SIZE: u32;
override LAYERS: u32;
override SCALE: f32;
#include "state.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> layer: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    if id.x >= size || id.y >= state.count { return; }
    let g = gate[id.y * size + id.x];
    let activated = vec4(gelu(g.x), gelu(g.y), gelu(g.z), gelu(g.w));
    out[id.y * size + id.x] = vec4<half>(activated * inputs[(id.y * LAYERS + layer[0]) * size + id.x] * SCALE);
}
