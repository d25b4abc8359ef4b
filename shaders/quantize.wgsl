// This rounds the vectors of a prompt's tokens to 8-bit integers, for matmul_int8.wgsl. Each block of 32 has
//     d = max |x| / 127      q = round(x / d)
//
// x half [max count, K]      q: the signed bytes of 8 words a block, [max count, K / 32]
// factors f32 [max count, K / 32] of (d, d sum q)
// Grid: x = blocks of a token / 64, y = token. One thread has one block.
override K: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<half>>;
@group(0) @binding(2) var<storage, read_write> q: array<u32>;
@group(0) @binding(3) var<storage, read_write> factors: array<vec2<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= K / 32u || id.y >= state.count { return; }
    let block = id.y * (K / 32u) + id.x;
    var highest = vec4(0.0);
    for (var i = 0u; i < 8u; i++) { highest = max(highest, abs(vec4<f32>(x[block * 8u + i]))); }
    let d = max(max(highest.x, highest.y), max(highest.z, highest.w)) / 127.0;
    let inverse = select(1.0 / d, 0.0, d < 1e-30);
    var sum = 0;
    for (var i = 0u; i < 8u; i++) {
        let rounded = vec4<i32>(round(vec4<f32>(x[block * 8u + i]) * inverse));
        let word = pack4xI8(rounded);
        q[block * 8u + i] = word;
        sum += dot4I8Packed(word, 0x01010101u);
    }
    factors[block] = vec2(d, d * f32(sum));
}
