// What each layer is told of each token (Gemma 3n, transformers' project_per_layer_inputs): what the context makes of the
// token's embedding, normed, and what a table has of the token itself:
//     out[t, l] = (weight * context[t, l] / rms(context[t, l]) + SCALE rows[t, l]) / sqrt(2)
// with rms(v) = sqrt(mean(v^2) + eps) over the SIZE numbers of a layer.
//
// context, rows, out f32 [max count, LAYERS, SIZE]      weight f32 [SIZE]
// Grid: x = layer, y = token. A workgroup has a layer's numbers of one token.
override WORKGROUP_SIZE: u32;
override LAYERS: u32;
override SIZE: u32;
override SCALE: f32;
override EPS: f32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> context: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> rows: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.y >= state.count { return; }
    let size = SIZE / 4u;
    let start = (group.y * LAYERS + group.x) * size;
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) { squares += dot(context[start + i], context[start + i]); }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(SIZE) + EPS);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        out[start + i] = (weight[i] * context[start + i] * scale + SCALE * rows[start + i]) * 0.7071067811865476;
    }
}
