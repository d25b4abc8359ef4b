// Between the head and sampling, this puts the logits of tokens that must not come next out of sampling's reach.
//     l = -1e32      if the token's bit is 0: far below NOTHING of sampling.wgsl, but neither penalty nor temperature
//                    can take it out of the range of f32
//
// mask: a bit a token [sequences, STRIDE]      logits f32 [sequences, STRIDE], in place
// Grid: x = part of PART tokens, y = sequence; a workgroup each.
override VOCAB: u32;
override PART: u32;
override STRIDE: u32;
override WORKGROUP_SIZE: u32;

@group(0) @binding(0) var<storage, read> mask: array<u32>;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let first = group.y * STRIDE;
    let first_word = group.y * ((STRIDE + 31u) / 32u);
    let end = min((group.x + 1u) * PART, VOCAB);
    for (var token = group.x * PART + thread; token < end; token += WORKGROUP_SIZE) {
        if ((mask[first_word + token / 32u] >> (token % 32u)) & 1u) == 0u { logits[first + token] = -1e32; }
    }
}
