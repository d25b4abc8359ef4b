// This is matmul.wgsl for CPU adapters. They emulate workgroup memory and barriers at a loss, and load for each thread of a
// subgroup in turn, even if all load the same.
//     y[t, r] = SCALE sum_k W[r, k] x[t, k] (+ bias[r] if BIAS)      for t < count, accumulated in f32
//
// W: weights.wgsl [ROWS, K]      x half [max count, K]
// bias f32 [STRIDE], y f32 [max count, STRIDE]: columns [FIRST_ROW, FIRST_ROW + ROWS)
// Grid: x = tiles of 64 rows, y = tiles of TOKENS tokens: 1, 2, 4 or 8. A thread computes a row for all of them: it loads the
// row's weights once, and an eighth of each token's x, which the threads of a subgroup hand to each other.
override TOKENS: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
override STRIDE: u32;
override SCALE: f32;
override BIAS: bool;
#include "weights.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> x: array<vec4<half>>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// Where the blocks of token `index` of the tile begin; the last token stands in for those that there are not.
fn token_row(token: u32, index: u32) -> u32 {
    return min(token + index, state.count - 1u) * (K / 32u);
}

// The product with token `index` of the tile at block `block`. Each of 8 threads loads an eighth of the token's x.
fn product(w: Block, token: u32, index: u32, block: u32, lane: u32, size: u32) -> f32 {
    let at = (token_row(token, index) + block) * 8u;
    if size < 8u {
        return block_dot(w, Block(
            vec4<f32>(x[at]), vec4<f32>(x[at + 1u]), vec4<f32>(x[at + 2u]), vec4<f32>(x[at + 3u]),
            vec4<f32>(x[at + 4u]), vec4<f32>(x[at + 5u]), vec4<f32>(x[at + 6u]), vec4<f32>(x[at + 7u]),
        ));
    }
    let mine = vec4<f32>(x[at + lane % 8u]);
    return block_dot(w, Block(
        subgroupShuffle(mine, 0u), subgroupShuffle(mine, 1u), subgroupShuffle(mine, 2u), subgroupShuffle(mine, 3u),
        subgroupShuffle(mine, 4u), subgroupShuffle(mine, 5u), subgroupShuffle(mine, 6u), subgroupShuffle(mine, 7u),
    ));
}

fn store(token: u32, row: u32, sum: f32) {
    if token >= state.count || row >= ROWS { return; }
    var offset = 0.0;
    if BIAS { offset = bias[FIRST_ROW + row]; }
    y[token * STRIDE + FIRST_ROW + row] = sum * SCALE + offset;
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) size: u32,
) {
    let row = group.x * 64u + thread;
    let token = group.y * TOKENS;
    if token >= state.count { return; }
    let blocks = K / 32u;
    let first = min(row, ROWS - 1u) * blocks;
    var s0 = 0.0;
    var s1 = 0.0;
    var s2 = 0.0;
    var s3 = 0.0;
    var s4 = 0.0;
    var s5 = 0.0;
    var s6 = 0.0;
    var s7 = 0.0;
    for (var block = 0u; block < blocks; block++) {
        let w = dequantize(first + block);
        s0 += product(w, token, 0u, block, lane, size);
        if TOKENS > 1u { s1 += product(w, token, 1u, block, lane, size); }
        if TOKENS > 2u {
            s2 += product(w, token, 2u, block, lane, size);
            s3 += product(w, token, 3u, block, lane, size);
        }
        if TOKENS > 4u {
            s4 += product(w, token, 4u, block, lane, size);
            s5 += product(w, token, 5u, block, lane, size);
            s6 += product(w, token, 6u, block, lane, size);
            s7 += product(w, token, 7u, block, lane, size);
        }
    }
    store(token + 0u, row, s0);
    if TOKENS > 1u { store(token + 1u, row, s1); }
    if TOKENS > 2u {
        store(token + 2u, row, s2);
        store(token + 3u, row, s3);
    }
    if TOKENS > 4u {
        store(token + 4u, row, s4);
        store(token + 5u, row, s5);
        store(token + 6u, row, s6);
        store(token + 7u, row, s7);
    }
}
