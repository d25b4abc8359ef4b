// This file is included by the kernels that choose the next token. It is not a kernel.
// The including file sets WORKGROUP_SIZE, a multiple of 8.
struct Sampling {
    temperature: f32,         // 0: the likeliest token
    top_p: f32,               // 1: off
    min_p: f32,               // 0: off
    repetition_penalty: f32,  // 1: off
    top_k: u32,               // 0: off
    seed: u32,
}

// A part of the vocabulary, summed up.
struct Summary {
    highest: f32,  // logit
    sum: f32,      // of e^(logit - highest)
    chosen: f32,   // the highest logit plus noise
    token: u32,    // of that
}

const NOTHING = Summary(-1e30, 0.0, -1e30, 0xffffffffu);

fn merge(a: Summary, b: Summary) -> Summary {
    let highest = max(a.highest, b.highest);
    let sum = a.sum * exp(a.highest - highest) + b.sum * exp(b.highest - highest);
    // Of equal ones the lower token wins, whatever the order of merging.
    if b.chosen > a.chosen || (b.chosen == a.chosen && b.token < a.token) {
        return Summary(highest, sum, b.chosen, b.token);
    }
    return Summary(highest, sum, a.chosen, a.token);
}

// The integer hash lowbias32.
fn mix(word: u32) -> u32 {
    var h = word;
    h = (h ^ (h >> 16u)) * 0x21f0aaadu;
    h = (h ^ (h >> 15u)) * 0x735a2d97u;
    return h ^ (h >> 15u);
}

// A draw from the standard Gumbel distribution that (seed, position, token) alone determine. The token with the highest
// logit + noise is a draw from softmax(logits) (Gumbel-max). The uniform variable is near 0 where the noise is large, so
// that f32 keeps its precision there.
fn gumbel(seed: u32, position: u32, token: u32) -> f32 {
    let hash = mix(token + 0x9e3779b9u * mix(position + 0x9e3779b9u * mix(seed)));
    let u = min((f32(hash) + 0.5) / 4294967296.0, 1.0 - 1.0 / 16777216.0);
    let exponential = select(-log(1.0 - u), u + 0.5 * u * u, u < 0.001);
    return -log(exponential);
}

var<workgroup> merge_scratch: array<Summary, WORKGROUP_SIZE>;
var<workgroup> merge_eighths: array<Summary, 8>;

// Over the workgroup's threads, as workgroup_sums in reduce.wgsl.
fn workgroup_merge(thread: u32, value: Summary) -> Summary {
    merge_scratch[thread] = value;
    workgroupBarrier();
    if thread < 8u {
        var eighth = NOTHING;
        for (var i = thread; i < WORKGROUP_SIZE; i += 8u) { eighth = merge(eighth, merge_scratch[i]); }
        merge_eighths[thread] = eighth;
    }
    workgroupBarrier();
    var merged = NOTHING;
    for (var i = 0u; i < 8u; i++) { merged = merge(merged, merge_eighths[i]); }
    return merged;
}
