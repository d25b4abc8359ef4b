// Blocks of a GGUF file in Q5_0 (ggml-quants.c, block_q5_0) become rows of the layout INT8, bit for bit:
//     block: f16 d, 32 high bits h, 16 bytes of nibbles n
//     quants: byte i is (n[i] + 16 h[i]) - 16      scales[block / 2] = d of two blocks
// Byte i of the nibbles has n[i] in its low half and n[i + 16] in its high one.
//
// run: see import_run.wgsl      raw: 22 bytes a block
// quants: eight words a block      scales: a word for two blocks, zero in its high half after an odd last block
// Grid: x * y workgroups of 64 threads. One thread has two blocks, which are eleven words.
#include "import_run.wgsl"
#include "import_words.wgsl"

@group(0) @binding(0) var<storage, read> run: Run;
@group(0) @binding(1) var<storage, read> raw: array<u32>;
@group(0) @binding(2) var<storage, read_write> quants: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;

// Sixteen numbers, of which the low bits are the low nibbles of `nibbles` and the fifth ones are the low bits of `high`.
fn numbers(nibbles: vec4<u32>, high: u32) -> vec4<u32> {
    let bits = (vec4(high) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u);
    // The factor puts bit k of a nibble at bit 8k, and other bits where the mask takes none.
    let fifth = ((bits * vec4(0x00204081u)) & vec4(0x01010101u)) << vec4(4u);
    // The top bits keep a byte from borrowing from the next one.
    let bytes = (nibbles & vec4(0x0f0f0f0fu)) | fifth | vec4(0x80808080u);
    return (bytes - vec4(0x10101010u)) ^ vec4(0x80808080u);
}

fn store(block: u32, high: u32, nibbles: vec4<u32>) {
    quants[block * 2u] = numbers(nibbles, high);
    quants[block * 2u + 1u] = numbers(nibbles >> vec4(4u), high >> 16u);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let pair = (group.y * groups.x + group.x) * 64u + thread;
    if pair * 2u >= run.count { return; }
    let block = run.first + pair * 2u;
    let at = pair * 11u;
    let start = raw[at];
    let low = four(at + 1u);
    let middle = raw[at + 5u];
    store(block, (start >> 16u) | (low.x << 16u), between(low, middle));
    var scale = start & 0xffffu;
    if pair * 2u + 1u < run.count {
        store(block + 1u, raw[at + 6u], four(at + 7u));
        scale |= middle & 0xffff0000u;
    }
    scales[block / 2u] = scale;
}
