// Token embeddings, scaled (Gemma 3 report, section 2):
//     residual[i] = SCALE E[tokens[i]]          for the tokens i < count of a chunk, or
//     residual[s] = SCALE E[tokens[slot[s]]]    if BY_SLOT, for the last token of each of several sequences
//
// A token of VOCABULARY or above is looked up as token 0.
//
// E is the part [FIRST_ROW, FIRST_ROW + ROWS) of the vocabulary, so that a table over the binding limit is looked up
// by several dispatches, each of which leaves other parts' tokens alone.
//
// tokens u32 [max count], or [slots] if BY_SLOT      residual f32 [max count, K]
// Grid: x = blocks of a row / 32, y = token, z = sequence. One thread dequantises one block of 32.
#include "weights.wgsl"
#include "state.wgsl"

override K: u32;
override FIRST_ROW: u32;
override ROWS: u32;
override SCALE: f32;
override BY_SLOT: bool;
override VOCABULARY: u32;

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> states: array<State>;
@group(0) @binding(3) var<storage, read> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> residual: array<vec4<f32>>;

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let blocks = K / 32u;
    let block = id.x;
    if block >= blocks || id.y >= states[id.z].count { return; }
    let token = tokens[select(id.y, states[id.z].slot, BY_SLOT)];
    let row = select(token, 0u, token >= VOCABULARY) - FIRST_ROW;  // below FIRST_ROW it wraps around
    if row >= ROWS { return; }
    let weights = dequantize(row * blocks + block);
    for (var i = 0u; i < 8u; i++) {
        residual[((id.y + id.z) * blocks + block) * 8u + i] = weights[i] * SCALE;
    }
}
