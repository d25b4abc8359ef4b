// LayerNorm of each token (arXiv 1607.06450), after adding the block's output to the residual stream:
//     residual += y                                                               if ADD
//     out       = weight * (residual - mean) / sqrt(mean((residual - mean)^2) + eps) + bias
// in f32. The mean is taken off before the squares are summed up, so that nothing cancels.
//
// residual, y f32 [max count, K]      out half [max count, K]      norm f32 [2, K]: weight, bias
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
override ADD: bool;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read_write> residual: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= state.count { return; }
    let size = K / 4u;
    let start = group.x * size;
    var sum = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        if ADD { residual[start + i] += y[start + i]; }
        sum += dot(residual[start + i], vec4(1.0));
    }
    let mean = workgroup_sum(thread, sum) / f32(K);
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let centred = residual[start + i] - mean;
        squares += dot(centred, centred);
    }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        out[start + i] = vec4<half>((residual[start + i] - mean) * scale * norm[i] + norm[size + i]);
    }
}
