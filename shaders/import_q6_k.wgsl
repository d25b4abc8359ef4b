// Super-blocks of a GGUF file in Q6_K (ggml-quants.c, block_q6_K) become rows of the layout INT8_SUPER, bit for bit:
//     super-block: 128 bytes of nibbles n, 64 bytes of bits h, two for each number, 16 signed bytes sc, f16 d
//     quants: the bytes (n + 16 h) - 32      scales: d, alone in its word; then the 16 sc
// A half of a super-block is four runs of 32 numbers. Its first two runs are the low halves of its 64 bytes of nibbles and
// the others the high ones; run i has bits 2i and 2i + 1 of its 32 bytes of h.
//
// run: see import_run.wgsl; its blocks are super-blocks      raw: 210 bytes a super-block
// quants: 64 words a super-block      scales: five words a super-block
// Grid: x * y workgroups of 64 threads. Four threads have a super-block, each of them half of each run of a half.
#include "import_run.wgsl"
#include "import_words.wgsl"

@group(0) @binding(0) var<storage, read> run: Run;
@group(0) @binding(1) var<storage, read> raw: array<u32>;
@group(0) @binding(2) var<storage, read_write> quants: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;

// Four words that begin at a word, or if `odd` in the middle of it.
fn unaligned(at: u32, odd: bool) -> vec4<u32> {
    let words = four(at);
    if odd { return between(words, raw[at + 4u]); }
    return words;
}

// Nibbles in the low halves of bytes, and the two bits above them in the low bits of `high`.
fn numbers(nibbles: vec4<u32>, high: vec4<u32>) -> vec4<u32> {
    // The top bits keep a byte from borrowing from the next one.
    let bytes = (nibbles & vec4(0x0f0f0f0fu)) | ((high & vec4(0x03030303u)) << vec4(4u)) | vec4(0x80808080u);
    return (bytes - vec4(0x20202020u)) ^ vec4(0x80808080u);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    let local = index / 4u;
    if local >= run.count { return; }
    let super_block = run.first + local;
    let start = local * 105u / 2u;  // 210 bytes are 105 halves of words
    let odd = local % 2u == 1u;
    let quarter = index % 4u;
    let half_block = quarter / 2u;
    let side = quarter % 2u;

    let at = start + half_block * 16u + side * 4u;
    let a = unaligned(at, odd);
    let b = unaligned(at + 8u, odd);
    let high = unaligned(start + 32u + half_block * 8u + side * 4u, odd);
    let out = super_block * 16u + half_block * 8u + side;
    quants[out] = numbers(a, high);
    quants[out + 2u] = numbers(b, high >> vec4(2u));
    quants[out + 4u] = numbers(a >> vec4(4u), high >> vec4(4u));
    quants[out + 6u] = numbers(b >> vec4(4u), high >> vec4(6u));

    var sc = raw[start + 48u + quarter];
    let next = raw[start + 49u + quarter];
    if odd { sc = (sc >> 16u) | (next << 16u); }
    scales[super_block * 5u + 1u + quarter] = sc;
    if quarter == 3u {  // it has the word with d
        scales[super_block * 5u] = select(next & 0xffffu, next >> 16u, odd);
    }
}
