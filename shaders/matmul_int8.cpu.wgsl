// This is matmul_int8.wgsl for CPU adapters, on the plan of matmul.cpu.wgsl:
//     y[t, r] = SCALE sum_k W[r, k] x[t, k]      for t < count; a block's 32 products are summed as integers
//
// W: weights.wgsl [ROWS, K], a layout of integers      x: q and factors of quantize.wgsl [max count, K]
// y f32 [max count, STRIDE]: columns [FIRST_ROW, FIRST_ROW + ROWS)
// Grid: x = tiles of 128 rows, y = tiles of TOKENS = 8 tokens. A thread computes 8 tokens by 2 rows.
override TOKENS: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
override STRIDE: u32;
override SCALE: f32;
#include "weights.wgsl"
#include "int8_product.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> x_factors: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

fn weights(block: u32) -> Weights {
    return Weights(integers(block), factors(block));
}

fn activations(block: u32) -> Activations {
    return Activations(x[2u * block], x[2u * block + 1u], x_factors[block]);
}

// Where the blocks of token `index` of the tile begin; the last token stands in for those that there are not.
fn token_row(token: u32, index: u32) -> u32 {
    return min(token + index, state.count - 1u) * (K / 32u);
}

// The products with the two rows a and b of token `index` of the tile, whose x thread `index` of the subgroup has. Subgroups
// of less than 8 load it instead.
fn products(
    a: Weights, b: Weights, mine: Activations, index: u32, token: u32, block: u32, subgroup_size: u32,
) -> vec2<f32> {
    var x = Activations(
        subgroupShuffle(mine.low, index), subgroupShuffle(mine.high, index), subgroupShuffle(mine.f, index));
    if subgroup_size < 8u { x = activations(token_row(token, index) + block); }
    return vec2(product(a, x), product(b, x));
}

fn store(token: u32, row: u32, sums: vec2<f32>) {
    if token >= state.count { return; }
    let at = token * STRIDE + FIRST_ROW + row;
    if row < ROWS { y[at] = sums.x * SCALE; }
    if row + 1u < ROWS { y[at + 1u] = sums.y * SCALE; }
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) size: u32,
) {
    let row = 2u * (group.x * 64u + thread);
    let token = group.y * TOKENS;
    if token >= state.count { return; }
    let blocks = K / 32u;
    let first = min(row, ROWS - 1u) * blocks;
    let second = min(row + 1u, ROWS - 1u) * blocks;
    var s0 = vec2(0.0);
    var s1 = vec2(0.0);
    var s2 = vec2(0.0);
    var s3 = vec2(0.0);
    var s4 = vec2(0.0);
    var s5 = vec2(0.0);
    var s6 = vec2(0.0);
    var s7 = vec2(0.0);
    for (var block = 0u; block < blocks; block++) {
        let mine = activations(token_row(token, lane % 8u) + block);
        let a = weights(first + block);
        let b = weights(second + block);
        s0 += products(a, b, mine, 0u, token, block, size);
        s1 += products(a, b, mine, 1u, token, block, size);
        s2 += products(a, b, mine, 2u, token, block, size);
        s3 += products(a, b, mine, 3u, token, block, size);
        s4 += products(a, b, mine, 4u, token, block, size);
        s5 += products(a, b, mine, 5u, token, block, size);
        s6 += products(a, b, mine, 6u, token, block, size);
        s7 += products(a, b, mine, 7u, token, block, size);
    }
    store(token + 0u, row, s0);
    store(token + 1u, row, s1);
    store(token + 2u, row, s2);
    store(token + 3u, row, s3);
    store(token + 4u, row, s4);
    store(token + 5u, row, s5);
    store(token + 6u, row, s6);
    store(token + 7u, row, s7);
}
