// The mean of the four streams of AltUp after the last layer (arXiv 2301.13310, as Gemma 3n ends them): the first one, and
// the projections of the others, each made as long as the first one is:
//     out[t] = (x[t] + sum_a y_a[t] rms(x[t]) / max(rms(y_a[t]), sqrt(FLOOR))) / 4
// with rms(v) = sqrt(mean(v^2)).
//
// x, y_1, y_2, y_3, out f32 [max count, K]
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override FLOOR: f32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y_1: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> y_2: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> y_3: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= state.count { return; }
    let size = K / 4u;
    let start = group.x * size;
    var squares = vec4(0.0);
    for (var i = start + thread; i < start + size; i += WORKGROUP_SIZE) {
        squares += vec4(dot(x[i], x[i]), dot(y_1[i], y_1[i]), dot(y_2[i], y_2[i]), dot(y_3[i], y_3[i]));
    }
    let means = workgroup_sums(thread, squares) / f32(K);
    let scales = sqrt(means.x) / sqrt(max(means.yzw, vec3(FLOOR)));
    for (var i = start + thread; i < start + size; i += WORKGROUP_SIZE) {
        out[i] = (x[i] + y_1[i] * scales.x + y_2[i] * scales.y + y_3[i] * scales.z) * 0.25;
    }
}
