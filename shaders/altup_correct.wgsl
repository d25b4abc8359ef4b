// What AltUp makes of its prediction once a layer is computed (arXiv 2301.13310, Algorithm 1):
//     x[t]          = residual[t] + post_weight * y[t] / rms(y[t])              the layer's output
//     m             = tanh(M (router_weight * x[t] / rms(x[t])) / K)
//     streams[t, a] = predicted[t, a] + (C[a] . m + 1) (x[t] - predicted[t, 0])
//     first[t]      = output_scale * streams[t, 0]
// with rms(v) = sqrt(mean(v^2) + eps).
//
// residual, y, first f32 [max count, K]      predicted f32 [max count, 4, K], which the streams take the place of
// weights f32 [2, K]: post_weight, output_scale      router: altup_router.wgsl      coefficients C f32 [4, 4]
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
override VECTORS = K / 4u;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> residual: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> weights: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> router: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> coefficients: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> streams: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> first: array<vec4<f32>>;
#include "altup_router.wgsl"

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = group.x;
    if token >= state.count { return; }
    let size = VECTORS;
    let start = token * 4u * size;
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) { squares += dot(y[token * size + i], y[token * size + i]); }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    squares = 0.0;
    var products = vec4(0.0);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let x = residual[token * size + i] + y[token * size + i] * scale * weights[i];
        squares += dot(x, x);
        products += router_products(x, i);
    }
    let m = routed(thread, squares, products);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let x = residual[token * size + i] + y[token * size + i] * scale * weights[i];
        let innovation = x - streams[start + i];
        for (var a = 0u; a < 4u; a++) {
            streams[start + a * size + i] += (dot(coefficients[a], m) + 1.0) * innovation;
        }
        first[token * size + i] = streams[start + i] * weights[size + i];
    }
}
