// Softmax of each row, in rows that a matrix with whole blocks of columns can be multiplied by:
//     out[t, i] = exp(x[t, i] - highest) / sum_j exp(x[t, j] - highest)      for i < K, and 0 for K <= i < STRIDE
//
// x f32 [max count, K]      out half [max count, STRIDE]
// Grid: x * y workgroups; LANES threads share a row.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override K: u32;
override STRIDE: u32;
#include "lanes.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<half>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let row = lane_row(group, groups, thread);
    let lane = thread % LANES;
    let begin = min(row, state.count - 1u) * K;
    var highest = x[begin];
    for (var i = lane; i < K; i += LANES) { highest = max(highest, x[begin + i]); }
    highest = lane_max(thread, highest);
    var sum = 0.0;
    for (var i = lane; i < K; i += LANES) { sum += exp(x[begin + i] - highest); }
    let scale = 1.0 / lane_sum(thread, sum);
    if row >= state.count { return; }
    for (var i = lane; i < STRIDE; i += LANES) {
        var share = 0.0;
        if i < K { share = exp(x[begin + i] - highest) * scale; }
        out[row * STRIDE + i] = half(share);
    }
}
