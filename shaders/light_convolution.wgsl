// What is between the two matrices of a conformer's light convolution (arXiv 2005.08100, as Gemma 3n has it): a gated linear
// unit, a convolution over time of each channel by itself, which sees no later frame, RMSNorm and SiLU.
//     g[t, c] = x[t, c] sigmoid(x[t, K + c])
//     y[t, c] = sum_{j < TAPS} weight[j, c] g[t - (TAPS - 1) + j, c], with g = 0 before the first frame
//     out[t] = silu(norm * y[t] / rms(y[t]))      for t < count
// with rms(v) = sqrt(mean(v^2) + eps), in f32.
//
// x f32 [max count, 2 K]      weight f32 [TAPS, K]      norm f32 [K]      out half [max count, K]
// Grid: one workgroup a frame. It computes g of the frames before it anew, which costs less than writing it down.
override WORKGROUP_SIZE: u32;
override K: u32;
override TAPS: u32;
override EPS: f32;
override VECTORS = K / 4u;
#include "reduce.wgsl"
#include "sigmoid.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

var<workgroup> convolved: array<vec4<f32>, VECTORS>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let frame = group.x;
    if frame >= state.count { return; }
    var squares = 0.0;
    for (var i = thread; i < VECTORS; i += WORKGROUP_SIZE) {
        var sum = vec4(0.0);
        for (var back = 0u; back < min(TAPS, frame + 1u); back++) {
            let at = (frame - back) * 2u * VECTORS + i;
            sum += weight[(TAPS - 1u - back) * VECTORS + i] * x[at] * sigmoid(x[at + VECTORS]);
        }
        convolved[i] = sum;
        squares += dot(sum, sum);
    }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    for (var i = thread; i < VECTORS; i += WORKGROUP_SIZE) {
        let normed = convolved[i] * scale * norm[i];
        out[frame * VECTORS + i] = vec4<half>(normed * sigmoid(normed));
    }
}
