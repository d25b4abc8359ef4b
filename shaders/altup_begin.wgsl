// The four streams of AltUp at the first layer (Alternating Updates, arXiv 2301.13310, as Gemma 3n begins them): the
// embedding, and three projections of it, each made as long as the embedding is:
//     streams[t, 0] = x[t]      streams[t, a] = y[t, a - 1] * rms(x[t]) / max(rms(y[t, a - 1]), sqrt(FLOOR))
// with rms(v) = sqrt(mean(v^2)).
//
// x f32 [max count, K]      y f32 [max count, 3, K]      streams f32 [max count, 4, K]
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override K: u32;
override FLOOR: f32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> streams: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let token = group.x;
    if token >= state.count { return; }
    let size = K / 4u;
    var squares = vec4(0.0);  // of x, and of each projection
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let a = x[token * size + i];
        let b = y[(token * 3u) * size + i];
        let c = y[(token * 3u + 1u) * size + i];
        let d = y[(token * 3u + 2u) * size + i];
        squares += vec4(dot(a, a), dot(b, b), dot(c, c), dot(d, d));
    }
    let means = workgroup_sums(thread, squares) / f32(K);
    let scales = sqrt(means.x) / sqrt(max(means.yzw, vec3(FLOOR)));
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        streams[token * 4u * size + i] = x[token * size + i];
        for (var a = 0u; a < 3u; a++) {
            streams[(token * 4u + a + 1u) * size + i] = y[(token * 3u + a) * size + i] * scales[a];
        }
    }
}
