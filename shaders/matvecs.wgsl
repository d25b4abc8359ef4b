// This multiplies a matrix by a few vectors, one of each of several sequences. Weights are read and dequantised once for
// VECTORS of them.
//     y[t, r] = sum_k W[r, k] x[t, k]      for t < count, accumulated in f32
//
// W: weights.wgsl [ROWS, K]      x f32 [max count, K]      y f32 [max count, STRIDE]: columns [FIRST_ROW, FIRST_ROW + ROWS)
// Workgroup: WORKGROUP_SIZE / LANES teams of LANES threads. A team computes two rows for VECTORS (at most 8) vectors: each of
// its threads takes every LANES-th block of 32 columns, then adds up some of the results.
// Grid: x * y workgroups cover the rows, z = tiles of VECTORS vectors.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
override STRIDE: u32;
override VECTORS: u32;
override PARTIAL = 2u * VECTORS * WORKGROUP_SIZE;
#include "weights.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

var<workgroup> partial: array<f32, PARTIAL>;  // [vector, row of the team, thread]

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let blocks = K / 32u;
    let teams = WORKGROUP_SIZE / LANES;
    let first_team = (group.y * groups.x + group.x) * teams;
    let row = 2u * (first_team + thread / LANES);
    let first = min(row, ROWS - 1u) * blocks;
    let second = min(row + 1u, ROWS - 1u) * blocks;
    let tile = group.z * VECTORS;
    var sums: array<vec2<f32>, 8>;
    for (var block = thread % LANES; block < blocks; block += LANES) {
        let a = dequantize(first + block);
        let b = dequantize(second + block);
        for (var i = 0u; i < VECTORS; i++) {
            let at = (min(tile + i, state.count - 1u) * blocks + block) * 8u;
            let v = Block(x[at], x[at + 1u], x[at + 2u], x[at + 3u], x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]);
            sums[i] += vec2(block_dot(a, v), block_dot(b, v));
        }
    }
    for (var i = 0u; i < VECTORS; i++) {
        partial[2u * i * WORKGROUP_SIZE + thread] = sums[i].x;
        partial[(2u * i + 1u) * WORKGROUP_SIZE + thread] = sums[i].y;
    }
    workgroupBarrier();
    for (var result = thread; result < 2u * VECTORS * teams; result += WORKGROUP_SIZE) {
        let team = result % teams;
        let vector = tile + result / teams / 2u;
        let r = 2u * (first_team + team) + result / teams % 2u;
        var sum = 0.0;
        for (var lane = 0u; lane < LANES; lane++) {
            sum += partial[result / teams * WORKGROUP_SIZE + team * LANES + lane];
        }
        if vector < state.count && r < ROWS { y[vector * STRIDE + FIRST_ROW + r] = sum; }
    }
}
