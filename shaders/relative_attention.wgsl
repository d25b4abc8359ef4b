// Attention to the neighbours of each token, in which a place relative to the token has a vector of its own (Transformer-XL,
// arXiv 1901.02860, as Gemma 3n's audio encoder has it):
//     score[i, d] = CAP tanh((scale * q[i]) . (k[j] + position[d]) / CAP)      with j = i - PAST + d
//     out[i] = sum_d softmax_d(score[i, d]) v[j]      over d < SPAN with 0 <= j < count
// for each head by itself.
//
// qkv f32 [max count, 3, HEADS, 4 VECTORS]: queries, keys, values      scale f32 [4 VECTORS]
// position f32 [SPAN, HEADS, 4 VECTORS]      out half [max count, HEADS, 4 VECTORS]
// Grid: x = QUERIES tokens, y = head. A thread scores pairs of a query and a place, then one of each query takes the softmax,
// then a thread gathers vectors of the output.
override WORKGROUP_SIZE: u32;
override HEADS: u32;
override VECTORS: u32;
override PAST: u32;
override SPAN: u32;
override CAP: f32;
override QUERIES: u32;
override PAIRS = QUERIES * SPAN;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> scale: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> position: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<half>>;

const LOWEST = -1e30;  // the score of a place outside

var<workgroup> weights: array<f32, PAIRS>;  // first the scores

// WGSL's own tanh may be as bad as its exp of twice the number, which overflows.
fn capped(score: f32) -> f32 {
    let z = clamp(score / CAP, -20.0, 20.0);
    let e = exp(-2.0 * abs(z));
    return CAP * sign(z) * (1.0 - e) / (1.0 + e);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = group.x * QUERIES;
    let head = group.y;
    let row = HEADS * VECTORS;  // of queries, of keys and of values
    for (var pair = thread; pair < PAIRS; pair += WORKGROUP_SIZE) {
        let query = first + pair / SPAN;
        let place = pair % SPAN;
        let key = query + place - PAST;  // before the first, it wraps, and is outside too
        var score = LOWEST;
        if query < state.count && key < state.count {
            let q = query * 3u * row + head * VECTORS;
            let k = (key * 3u + 1u) * row + head * VECTORS;
            let p = place * row + head * VECTORS;
            var sum = 0.0;
            for (var i = 0u; i < VECTORS; i++) {
                sum += dot(scale[i] * qkv[q + i], qkv[k + i] + position[p + i]);
            }
            score = capped(sum);
        }
        weights[pair] = score;
    }
    workgroupBarrier();
    if thread < QUERIES {
        var highest = LOWEST;
        for (var i = 0u; i < SPAN; i++) { highest = max(highest, weights[thread * SPAN + i]); }
        var total = 0.0;
        for (var i = 0u; i < SPAN; i++) {
            let weight = exp(weights[thread * SPAN + i] - highest);
            weights[thread * SPAN + i] = weight;
            total += weight;
        }
        for (var i = 0u; i < SPAN; i++) { weights[thread * SPAN + i] /= total; }
    }
    workgroupBarrier();
    for (var i = thread; i < QUERIES * VECTORS; i += WORKGROUP_SIZE) {
        let query = first + i / VECTORS;
        let vector = head * VECTORS + i % VECTORS;
        if query >= state.count { break; }
        var sum = vec4(0.0);
        for (var place = 0u; place < SPAN; place++) {
            let key = query + place - PAST;
            if key < state.count {
                sum += weights[i / VECTORS * SPAN + place] * qkv[(key * 3u + 2u) * row + vector];
            }
        }
        out[query * row + vector] = vec4<half>(sum);
    }
}
