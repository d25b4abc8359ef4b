// RMSNorm of each token of a prompt, after adding the block's output to the residual stream (Gemma 3 report, section 2):
//     residual = factor * residual + post_weight * y / rms(y)      if ADD; the factor is 1 if not SCALED
//     residual = factor * residual + y                             if ADD and PLAIN
//     out      = weight * residual / rms(residual)
// with rms(v) = sqrt(mean(v^2) + eps), in f32. The weights are 1 + w of the report.
//
// residual, y f32 [max count, K]      out half [max count, K], or [1, K] if LAST, for the step's last token alone
// norms f32 [2, K]: post_weight, weight; if SCALED, f32 [2 K + 1]: these and then factor, which post_weight has in it already
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
override ADD: bool;
override PLAIN: bool;
override SCALED: bool;
override LAST: bool;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read_write> residual: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> norms: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= state.count { return; }
    let size = K / 4u;
    let start = select(group.x, state.count - 1u, LAST) * size;
    if ADD {
        var scale = 1.0;
        if !PLAIN {
            var squares = 0.0;
            for (var i = thread; i < size; i += WORKGROUP_SIZE) {
                squares += dot(y[start + i], y[start + i]);
            }
            scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
        }
        for (var i = thread; i < size; i += WORKGROUP_SIZE) {
            if SCALED { residual[start + i] *= norms[2u * size].x; }
            residual[start + i] += y[start + i] * scale * select(norms[i], vec4(1.0), PLAIN);
        }
    }
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        squares += dot(residual[start + i], residual[start + i]);
    }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        out[group.x * size + i] = vec4<half>(residual[start + i] * scale * norms[size + i]);
    }
}
