// Token embeddings, scaled (Gemma 3 report, section 2):
//     residual[i] = sqrt(hidden) E[token[position + i]]      for i < count, or
//     residual[s] = sqrt(hidden) E[token[s, position[s]]]    for one token of each of several sequences
//
// E is the part [FIRST_ROW, FIRST_ROW + ROWS) of the vocabulary, so that a table over the binding limit is looked up
// by several dispatches, each of which leaves other parts' tokens alone.
//
// tokens   u32 [slots, CONTEXT]      residual f32 [max count, K]
// Grid: x = blocks of a row / 32, y = token, z = sequence. One thread dequantises one block of 32.
#include "weights.wgsl"
#include "state.wgsl"

override K: u32;
override FIRST_ROW: u32;
override ROWS: u32;
override SCALE: f32;
override CONTEXT: u32;

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> states: array<State>;
@group(0) @binding(3) var<storage, read> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> residual: array<vec4<f32>>;

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let blocks = K / 32u;
    let block = id.x;
    let state = states[id.z];
    if block >= blocks || id.y >= state.count { return; }
    let row = tokens[state.slot * CONTEXT + state.position + id.y] - FIRST_ROW;  // wraps around below FIRST_ROW, and so is out of range
    if row >= ROWS { return; }
    let weights = dequantize(row * blocks + block);
    for (var i = 0u; i < 8u; i++) {
        residual[((id.y + id.z) * blocks + block) * 8u + i] = weights[i] * SCALE;
    }
}
