// This keeps logits inside of [-CAP, CAP] (Gemma 2 report, arXiv 2408.00118, section 2):
//     logits[t, i] = CAP tanh(logits[t, i] / CAP)
//
// logits f32 [max count, SIZE]
// Grid: x = 64 numbers at a time, y = token.
override SIZE: u32;
override CAP: f32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= SIZE || id.y >= state.count { return; }
    let at = id.y * SIZE + id.x;
    // WGSL's own tanh may be as bad as its exp of twice the number, which overflows.
    let z = clamp(logits[at] / CAP, -20.0, 20.0);
    let e = exp(-2.0 * abs(z));
    logits[at] = CAP * sign(z) * (1.0 - e) / (1.0 + e);
}
