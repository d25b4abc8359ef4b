// Super-blocks of a GGUF file in Q4_K (ggml-quants.c, block_q4_K) become rows of the layout INT4_SUPER, bit for bit:
//     super-block: f16 d, f16 dmin, 12 bytes of 6-bit numbers sc and m for eight blocks, 128 bytes of nibbles
//     scales: d and dmin are a word; then sc and m of each block are bytes, two blocks a word
// Each 32 bytes of nibbles have one block in their low halves and the next one in their high ones. In `quants`, byte i of
// a block has column i in its low half and column i + 16 in its high one.
//
// run: see import_run.wgsl; its blocks are super-blocks      raw: 144 bytes a super-block, nine vectors of four words
// quants: 32 words a super-block      scales: five words a super-block
// Only bits are moved. Grid: x * y workgroups of 64 threads. One thread has two blocks, a quarter of a super-block.
#include "import_run.wgsl"

@group(0) @binding(0) var<storage, read> run: Run;
@group(0) @binding(1) var<storage, read> raw: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> quants: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let index = (group.y * groups.x + group.x) * 64u + thread;
    let quarter = index % 4u;
    if index / 4u >= run.count { return; }
    let super_block = run.first + index / 4u;
    let at = index / 4u * 9u;

    let a = raw[at + 1u + quarter * 2u];
    let b = raw[at + 2u + quarter * 2u];
    let low = vec4(0x0f0f0f0fu);
    let block = super_block * 8u + quarter * 2u;
    quants[block] = (a & low) | ((b & low) << vec4(4u));
    quants[block + 1u] = ((a >> vec4(4u)) & low) | (b & ~low);

    // The sc of blocks 0-3 are the low six bits of the bytes of y, and their m those of z. Blocks 4-7 have their low four
    // bits in w, and their high two in the top bits of y and z.
    let head = raw[at];
    var sc = head.y & 0x3f3f3f3fu;
    var m = head.z & 0x3f3f3f3fu;
    if quarter >= 2u {
        sc = (head.w & 0x0f0f0f0fu) | ((head.y >> 2u) & 0x30303030u);
        m = ((head.w >> 4u) & 0x0f0f0f0fu) | ((head.z >> 2u) & 0x30303030u);
    }
    let shift = quarter % 2u * 16u;
    let s = sc >> shift;
    let e = m >> shift;
    let pairs = (s & 0xffu) | ((e & 0xffu) << 8u) | ((s & 0xff00u) << 8u) | ((e & 0xff00u) << 16u);
    scales[super_block * 5u + 1u + quarter] = pairs;
    if quarter == 0u { scales[super_block * 5u] = head.x; }
}
