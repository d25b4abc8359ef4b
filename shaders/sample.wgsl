// This is the second step of sampling: choose the next token, keep it as the sequence's last one, and advance the state by it.
//
// Without filters the token is logits_scan's. With them, only tokens whose logit reaches a threshold are drawn from:
//     top_k: the k-th highest logit         top_p: the highest t with sum_{l >= t} softmax(l) >= top_p, among the top k
//     min_p: the highest logit + ln min_p
// The first two are found bit by bit, each bit by a count over the candidates. Candidates are the tokens within DEPTH of
// the highest logit, or all that mask.wgsl left if those are fewer than top_k, at most MINE a thread. If the threshold may
// lie lower, the whole vocabulary is searched.
//
// states are advanced      logits f32 [sequences, STRIDE], as logits_scan.wgsl leaves them      summaries [sequences, PARTS]
// samplings [sequences]      tokens u32 [slots]      seen: a bit a token [slots, STRIDE]
// Grid: one workgroup a sequence.
override VOCAB: u32;
override PART: u32;
override PARTS = (VOCAB + PART - 1u) / PART;
override STRIDE: u32;
override WORKGROUP_SIZE: u32;
#include "state.wgsl"
#include "sampling.wgsl"
#include "reduce.wgsl"

@group(0) @binding(0) var<storage, read_write> states: array<State>;
@group(0) @binding(1) var<storage, read> samplings: array<Sampling>;
@group(0) @binding(2) var<storage, read> logits: array<f32>;
@group(0) @binding(3) var<storage, read> summaries: array<Summary>;
@group(0) @binding(4) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(5) var<storage, read_write> seen: array<u32>;

const MINE = 64u;
const DEPTH = 8.0;

var<private> first: u32;          // of the sequence's logits
var<private> first_summary: u32;
var<private> mine: array<u32, MINE>;
var<private> mine_count = 0u;
var<private> search_all = false;

fn collect(thread: u32, lowest: f32) {
    for (var part = 0u; part < PARTS; part++) {
        if summaries[first_summary + part].highest < lowest { continue; }
        let end = min((part + 1u) * PART, VOCAB);
        for (var token = part * PART + thread; token < end; token += WORKGROUP_SIZE) {
            if logits[first + token] >= lowest {
                if mine_count < MINE { mine[mine_count] = token; }
                mine_count++;
            }
        }
    }
}

// The tokens that this thread goes over: candidate(thread, 0) to candidate(thread, candidates(thread) - 1).
fn candidates(thread: u32) -> u32 {
    return select(mine_count, (VOCAB - thread + WORKGROUP_SIZE - 1u) / WORKGROUP_SIZE, search_all);
}

fn candidate(thread: u32, i: u32) -> u32 {
    if search_all { return thread + i * WORKGROUP_SIZE; }
    return mine[i];
}

// An integer that grows with the float.
fn order(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

// What the candidates whose order is at least `lowest` amount to: their number, or their sum of e^(logit - highest).
fn amount(thread: u32, lowest: u32, by_mass: bool, highest: f32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < candidates(thread); i++) {
        let logit = logits[first + candidate(thread, i)];
        if order(logit) >= lowest { sum += select(1.0, exp(logit - highest), by_mass); }
    }
    return workgroup_sum(thread, sum);
}

fn filtered(thread: u32, sampling: Sampling, all: Summary, position: u32) -> u32 {
    collect(thread, all.highest - DEPTH);
    let near = workgroup_sums(thread, vec4(f32(mine_count), 0.0, 0.0, 0.0)).x;
    if near < f32(sampling.top_k) {
        mine_count = 0u;
        collect(thread, 0.5 * NOTHING.highest);  // all that can be drawn: mask.wgsl may have left only a few
    }
    let overflow = workgroup_sums(thread, vec4(select(0.0, 1.0, mine_count > MINE), 0.0, 0.0, 0.0)).x > 0.0;
    mine_count = min(mine_count, MINE);
    var nucleus = sampling.top_p * all.sum;
    if sampling.top_k > 0u {
        search_all = overflow;
    } else if sampling.top_p < 1.0 {
        search_all = amount(thread, 0u, true, all.highest) < nucleus || overflow;
    } else {
        search_all = overflow || log(sampling.min_p) < -DEPTH;
    }

    // First by number, then by mass among those: each time the highest order whose amount is still enough.
    var lowest = 0u;
    for (var by_mass = 0u; by_mass < 2u; by_mass++) {
        if select(sampling.top_k == 0u, sampling.top_p == 1.0, by_mass == 1u) { continue; }
        var enough = f32(sampling.top_k);
        if by_mass == 1u {
            if sampling.top_k > 0u { nucleus = sampling.top_p * amount(thread, lowest, true, all.highest); }
            enough = nucleus;
        }
        var found = 0u;
        for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
            if amount(thread, found | bit, by_mass == 1u, all.highest) >= enough { found |= bit; }
        }
        lowest = max(lowest, found);
    }
    if sampling.min_p > 0.0 { lowest = max(lowest, order(all.highest + log(sampling.min_p))); }

    var best = NOTHING;
    for (var i = 0u; i < candidates(thread); i++) {
        let token = candidate(thread, i);
        if order(logits[first + token]) >= lowest {
            best = merge(best, Summary(0.0, 0.0, logits[first + token] + gumbel(sampling.seed, position, token), token));
        }
    }
    return workgroup_merge(thread, best).token;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let state = states[group.x];
    let sampling = samplings[group.x];
    first = group.x * STRIDE;
    first_summary = group.x * PARTS;
    let position = state.position + state.count;
    var all = NOTHING;
    for (var part = thread; part < PARTS; part += WORKGROUP_SIZE) { all = merge(all, summaries[first_summary + part]); }
    all = workgroup_merge(thread, all);
    var token = all.token;
    if sampling.temperature > 0.0 && (sampling.top_k > 0u || sampling.top_p < 1.0 || sampling.min_p > 0.0) {
        token = filtered(thread, sampling, all, position);
    }
    if thread == 0u {
        tokens[state.slot] = token;
        states[group.x].position = position;
        states[group.x].count = 1u;
        states[group.x].token = token;
        if token < VOCAB { seen[state.slot * ((STRIDE + 31u) / 32u) + token / 32u] |= 1u << (token % 32u); }
    }
}
