// What AltUp expects of a layer before it is computed (arXiv 2301.13310, Algorithm 1), after the last layer's input has
// been added to the streams but the first:
//     h[t, a] = streams[t, a] + (post_weight * y[t] / rms(y[t]) if ADD and a > 0)
//     m       = tanh(M (router_weight * h[t, 0] / rms(h[t, 0])) / K)
//     predicted[t, a] = h[t, a] + sum_s C[4 a + s] . m h[t, s]      active[t] = predicted[t, 0]
// with rms(v) = sqrt(mean(v^2) + eps).
//
// streams, predicted f32 [max count, 4, K]      y, active f32 [max count, K]      post_weight f32 [K]
// router: altup_router.wgsl      coefficients C f32 [16, 4]
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
override ADD: bool;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> streams: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> post_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> router: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> coefficients: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> predicted: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> active_stream: array<vec4<f32>>;
#include "altup_router.wgsl"

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = group.x;
    if token >= state.count { return; }
    let size = K / 4u;
    let start = token * 4u * size;
    var scale = 0.0;
    if ADD {
        var squares = 0.0;
        for (var i = thread; i < size; i += WORKGROUP_SIZE) { squares += dot(y[token * size + i], y[token * size + i]); }
        scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    }
    var squares = 0.0;
    var products = vec4(0.0);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let h = streams[start + i];
        squares += dot(h, h);
        products += router_products(h, i);
    }
    let m = routed(thread, squares, products);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        var added = vec4(0.0);
        if ADD { added = y[token * size + i] * scale * post_weight[i]; }
        let h = array(
            streams[start + i],
            streams[start + size + i] + added,
            streams[start + 2u * size + i] + added,
            streams[start + 3u * size + i] + added,
        );
        for (var a = 0u; a < 4u; a++) {
            var sum = h[a];
            for (var s = 0u; s < 4u; s++) { sum += dot(coefficients[4u * a + s], m) * h[s]; }
            predicted[start + a * size + i] = sum;
            if a == 0u { active_stream[token * size + i] = sum; }
        }
    }
}
