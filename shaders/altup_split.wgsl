// The streams of AltUp after the last layer, each by itself, with that layer's input added to all but the first:
//     out_0[t] = streams[t, 0]      out_a[t] = streams[t, a] + weight * y[t] / rms(y[t])
// with rms(v) = sqrt(mean(v^2) + eps).
//
// streams f32 [max count, 4, K]      y, out_0, out_1, out_2, out_3 f32 [max count, K]      weight f32 [K]
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override EPS: f32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> streams: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out_0: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out_1: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> out_2: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> out_3: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = group.x;
    if token >= state.count { return; }
    let size = K / 4u;
    let start = token * 4u * size;
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) { squares += dot(y[token * size + i], y[token * size + i]); }
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let at = token * size + i;
        let added = y[at] * scale * weight[i];
        out_0[at] = streams[start + i];
        out_1[at] = streams[start + size + i] + added;
        out_2[at] = streams[start + 2u * size + i] + added;
        out_3[at] = streams[start + 3u * size + i] + added;
    }
}
