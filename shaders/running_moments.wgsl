// What a frame is normed by in a cumulative group norm (Universal Speech Model, as Gemma 3n has it): by the frames so far.
//     mean[t] = the mean of all numbers of frames 0 to t
//     variance[t] = 1 / (SIZE (t + 1)) sum_{s <= t} sum_i (x[s, i] - mean[s])^2
//     running[t] = (mean[t], 1 / sqrt(variance[t] + EPS))      for t < count
// Each frame s counts with the mean of its own time, not with that of time t. With m the mean of frame s alone, its term is
// sum_i (x[s, i] - m)^2 + SIZE (m - mean[s])^2, so the moments of the frames are enough.
//
// moments f32 [max count, 2]: m, and sum_i (x[s, i] - m)^2, of SIZE numbers      running f32 [max count, 2]
// Grid: one workgroup. A thread takes a run of frames, after the sum of those before it.
override WORKGROUP_SIZE: u32;
override SIZE: u32;
override EPS: f32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> moments: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> running: array<vec2<f32>>;

var<workgroup> sums: array<f32, WORKGROUP_SIZE>;

// The sum of the values of the threads before this one.
fn sum_before(thread: u32, value: f32) -> f32 {
    sums[thread] = value;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < thread; i++) { sum += sums[i]; }
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(local_invocation_index) thread: u32) {
    let run = (state.count + WORKGROUP_SIZE - 1u) / WORKGROUP_SIZE;
    let first = min(thread * run, state.count);
    let end = min(first + run, state.count);
    var own = 0.0;
    for (var t = first; t < end; t++) { own += moments[t].x; }
    let sum_of_means = sum_before(thread, own);
    var total = sum_of_means;
    var squares = 0.0;
    for (var t = first; t < end; t++) {
        total += moments[t].x;
        let apart = moments[t].x - total / f32(t + 1u);
        squares += moments[t].y + f32(SIZE) * apart * apart;
    }
    var sum_of_squares = sum_before(thread, squares);
    total = sum_of_means;
    for (var t = first; t < end; t++) {
        total += moments[t].x;
        let mean = total / f32(t + 1u);
        let apart = moments[t].x - mean;
        sum_of_squares += moments[t].y + f32(SIZE) * apart * apart;
        running[t] = vec2(mean, inverseSqrt(sum_of_squares / (f32(SIZE) * f32(t + 1u)) + EPS));
    }
}
