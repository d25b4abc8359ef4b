// This multiplies a matrix by the vectors of a prompt's tokens, in products of 8-bit integers:
//     y[t, r] = SCALE sum_k W[r, k] x[t, k]      for t < count; a block's 32 products are summed as integers
//
// W: weights.wgsl [ROWS, K], a layout of integers      x: q and factors of quantize.wgsl [max count, K]
// y f32 [max count, STRIDE]: columns [FIRST_ROW, FIRST_ROW + ROWS)
// Grid: x = tiles of 64 rows, y = tiles of TOKENS = 32 tokens. Each step brings one block of 32 columns of both tiles into
// workgroup memory, a row of 2 vectors padded to 3 against bank conflicts; a thread computes 4 tokens by 8 rows.
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

var<workgroup> w_tile: array<vec4<u32>, 192>;
var<workgroup> w_factors: array<vec3<f32>, 64>;
var<workgroup> x_tile: array<vec4<u32>, 96>;
var<workgroup> x_tile_factors: array<vec2<f32>, 32>;

fn tile_weights(row: u32) -> Weights {
    return Weights(array(w_tile[row * 3u], w_tile[row * 3u + 1u]), w_factors[row]);
}

fn tile_activations(token: u32) -> Activations {
    return Activations(x_tile[token * 3u], x_tile[token * 3u + 1u], x_tile_factors[token]);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first_row = group.x * 64u;
    let first_token = group.y * TOKENS;
    if first_token >= state.count { return; }
    let column = thread % 8u;     // of rows: column, column + 8, ..., column + 56 of the tile
    let line = thread / 8u * 4u;  // of tokens: line to line + 3 of the tile
    let blocks = K / 32u;

    var sums: array<vec4<f32>, 8>;  // [row], a component a token
    for (var block = 0u; block < blocks; block++) {
        let w_block = min(first_row + thread, ROWS - 1u) * blocks + block;
        let q = integers(w_block);
        w_tile[thread * 3u] = q[0];
        w_tile[thread * 3u + 1u] = q[1];
        w_factors[thread] = factors(w_block);
        let token = thread / 2u;
        let x_block = min(first_token + token, state.count - 1u) * blocks + block;
        x_tile[token * 3u + thread % 2u] = x[2u * x_block + thread % 2u];
        if thread % 2u == 0u { x_tile_factors[token] = x_factors[x_block]; }
        workgroupBarrier();
        let x0 = tile_activations(line);
        let x1 = tile_activations(line + 1u);
        let x2 = tile_activations(line + 2u);
        let x3 = tile_activations(line + 3u);
        for (var row = 0u; row < 8u; row++) {
            let w = tile_weights(column + row * 8u);
            sums[row] += vec4(product(w, x0), product(w, x1), product(w, x2), product(w, x3));
        }
        workgroupBarrier();
    }

    for (var row = 0u; row < 8u; row++) {
        let r = first_row + column + row * 8u;
        if r >= ROWS { continue; }
        for (var i = 0u; i < 4u; i++) {
            let token = first_token + line + i;
            if token < state.count { y[token * STRIDE + FIRST_ROW + r] = sums[row][i] * SCALE; }
        }
    }
}
