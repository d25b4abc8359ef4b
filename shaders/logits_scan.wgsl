// This is the first step of sampling: penalise and temper the logits, and sum up each part of the vocabulary.
//     l = logit / penalty, or logit * penalty if negative         for tokens that have occurred (arXiv 1909.05858)
//     l = l / temperature                                         unless the temperature is 0
//
// logits f32 [sequences, STRIDE], in place      seen: a bit a token [slots, STRIDE]      samplings [sequences]
// summaries [sequences, parts]
// Grid: x = part of PART tokens, y = sequence; a workgroup each.
override VOCAB: u32;
override PART: u32;
override STRIDE: u32;
override WORKGROUP_SIZE: u32;
#include "state.wgsl"
#include "sampling.wgsl"

@group(0) @binding(0) var<storage, read> states: array<State>;
@group(0) @binding(1) var<storage, read> samplings: array<Sampling>;
@group(0) @binding(2) var<storage, read> seen: array<u32>;
@group(0) @binding(3) var<storage, read_write> logits: array<f32>;
@group(0) @binding(4) var<storage, read_write> summaries: array<Summary>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let state = states[group.y];
    let sampling = samplings[group.y];
    let first = group.y * STRIDE;
    let first_seen = state.slot * ((STRIDE + 31u) / 32u);
    let position = state.position + state.count;
    var summary = NOTHING;
    let end = min((group.x + 1u) * PART, VOCAB);
    for (var token = group.x * PART + thread; token < end; token += WORKGROUP_SIZE) {
        var logit = logits[first + token];
        if ((seen[first_seen + token / 32u] >> (token % 32u)) & 1u) == 1u {
            let penalty = sampling.repetition_penalty;
            logit = select(logit / penalty, logit * penalty, logit < 0.0);
        }
        var chosen = logit;
        if sampling.temperature > 0.0 {
            logit /= sampling.temperature;
            chosen = logit + gumbel(sampling.seed, position, token);
        }
        logits[first + token] = logit;
        summary = merge(summary, Summary(logit, 1.0, chosen, token));
    }
    summary = workgroup_merge(thread, summary);
    if thread == 0u { summaries[group.y * groups.x + group.x] = summary; }
}
