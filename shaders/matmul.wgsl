// This multiplies a matrix by the vectors of a prompt's tokens, and dequantises the weights on the way:
//     y[t, r] = SCALE sum_k W[r, k] x[t, k] (+ bias[r] if BIAS)      for t < count, accumulated in f32
//
// W: weights.wgsl [ROWS, K]      x half [max count, K]
// bias f32 [STRIDE], y f32 [max count, STRIDE]: columns [FIRST_ROW, FIRST_ROW + ROWS)
// Grid: x = tiles of 64 rows, y = tiles of TOKENS tokens. Each step brings one block of 32 columns of both tiles into
// workgroup memory, a row of 8 vectors padded to 9 against bank conflicts; a thread computes 4 tokens by 8 rows.
override TOKENS: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
override STRIDE: u32;
override SCALE: f32;
override BIAS: bool;
override WORKGROUP_SIZE = 2u * TOKENS;
override X_VECTORS = 9u * TOKENS;
#include "weights.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> x: array<vec4<half>>;
@group(0) @binding(4) var<storage, read> bias: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

var<workgroup> w_tile: array<vec4<half>, 576>;
var<workgroup> x_tile: array<vec4<half>, X_VECTORS>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first_row = group.x * 64u;
    let first_token = group.y * TOKENS;
    if first_token >= state.count { return; }
    let column = thread % 8u;   // of rows: column, column + 8, ..., column + 56 of the tile
    let line = thread / 8u * 4u;  // of tokens: line to line + 3 of the tile
    let blocks = K / 32u;

    var sums: array<vec4<f32>, 8>;  // [row], a component a token
    for (var block = 0u; block < blocks; block++) {
        for (var row = thread; row < 64u; row += WORKGROUP_SIZE) {
            let w = dequantize(min(first_row + row, ROWS - 1u) * blocks + block);
            for (var i = 0u; i < 8u; i++) { w_tile[row * 9u + i] = vec4<half>(w[i]); }
        }
        for (var i = thread; i < 8u * TOKENS; i += WORKGROUP_SIZE) {
            let token = min(first_token + i / 8u, state.count - 1u);
            x_tile[i / 8u * 9u + i % 8u] = x[(token * blocks + block) * 8u + i % 8u];
        }
        workgroupBarrier();
        var partial = array<vec4<f32>, 8>();
        for (var i = 0u; i < 8u; i++) {
            let x0 = vec4<f32>(x_tile[line * 9u + i]);
            let x1 = vec4<f32>(x_tile[line * 9u + 9u + i]);
            let x2 = vec4<f32>(x_tile[line * 9u + 18u + i]);
            let x3 = vec4<f32>(x_tile[line * 9u + 27u + i]);
            for (var row = 0u; row < 8u; row++) {
                let w = vec4<f32>(w_tile[(column + row * 8u) * 9u + i]);
                partial[row] += vec4(dot(w, x0), dot(w, x1), dot(w, x2), dot(w, x3));
            }
        }
        for (var row = 0u; row < 8u; row++) { sums[row] += partial[row]; }
        workgroupBarrier();
    }

    for (var row = 0u; row < 8u; row++) {
        let r = first_row + column + row * 8u;
        if r >= ROWS { continue; }
        var offset = 0.0;
        if BIAS { offset = bias[FIRST_ROW + r]; }
        for (var i = 0u; i < 4u; i++) {
            let token = first_token + line + i;
            if token < state.count { y[token * STRIDE + FIRST_ROW + r] = sums[row][i] * SCALE + offset; }
        }
    }
}
