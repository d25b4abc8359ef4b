// This multiplies a matrix by a vector, and dequantises the weights on the way:
//     y[r] = sum_k W[r, k] x[k]
//
// W: weights.wgsl [ROWS, K]      x f32 [K]      y f32: rows [FIRST_ROW, FIRST_ROW + ROWS) of it are written
// Workgroup: WORKGROUP_SIZE / LANES teams of LANES threads. A team computes two rows at once, so that x is read once for
// both; each of its threads takes every LANES-th block of 32 columns. LANES = 1 suits CPU adapters, on which a barrier costs
// more than it saves.
// Grid: x * y workgroups cover the rows.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
#include "weights.wgsl"
#include "team.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
#include "sharing.wgsl"

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, place: Place) {
    let thread = place.thread;
    let team = (group.y * groups.x + group.x) * (WORKGROUP_SIZE / LANES) + thread / LANES;
    let row = 2u * team;
    let first = min(row, ROWS - 1u) * (K / 32u);
    let second = min(row + 1u, ROWS - 1u) * (K / 32u);
    var sums = vec2(0.0);
    for (var block = thread % LANES; block < K / 32u; block += LANES) {
        let x_part = x_block(block, place);
        sums += vec2(weights_dot(first + block, x_part), weights_dot(second + block, x_part));
    }
    sums = team_sum(thread, sums);
    if thread % LANES == 0u {
        if row < ROWS { y[FIRST_ROW + row] = sums.x; }
        if row + 1u < ROWS { y[FIRST_ROW + row + 1u] = sums.y; }
    }
}
