// A layer's attention beside its learned augmented residual (LAuReL, arXiv 2411.07501, as Gemma 3n has it):
//     out[t] = (residual[t] + attention_weight * y[t] / rms(y[t])
//               + normed[t] + laurel_weight * low[t] / rms(low[t])) / sqrt(2)
// with rms(v) = sqrt(mean(v^2) + eps). `normed` is what both are computed from, and `low` is a product of low rank of it.
//
// residual, y, low, out f32 [max count, K]      normed half [max count, K]      norms f32 [2, K]: attention, laurel
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> residual: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> normed: array<vec4<half>>;
@group(0) @binding(4) var<storage, read> low: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> norms: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= state.count { return; }
    let size = K / 4u;
    let start = group.x * size;
    var squares = vec4(0.0);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        squares += vec4(dot(y[start + i], y[start + i]), dot(low[start + i], low[start + i]), 0.0, 0.0);
    }
    let scales = inverseSqrt(workgroup_sums(thread, squares) / f32(K) + EPS);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let attended = residual[start + i] + y[start + i] * scales.x * norms[i];
        let augmented = vec4<f32>(normed[start + i]) + low[start + i] * scales.y * norms[size + i];
        out[start + i] = (attended + augmented) * 0.7071067811865476;
    }
}
