// Blocks of a GGUF file in Q4_0 (ggml-quants.c, block_q4_0) become rows of the layout INT4, bit for bit:
//     block: f16 d, 16 bytes of nibbles      quants[block] = the nibbles      scales[block / 2] = d of two blocks
//
// run: see import_run.wgsl      raw: 18 bytes a block
// quants: four words a block      scales: a word for two blocks, zero in its high half after an odd last block
// Only bits are moved. Grid: x * y workgroups of 64 threads. One thread has two blocks, which are nine words.
#include "import_run.wgsl"
#include "import_words.wgsl"

@group(0) @binding(0) var<storage, read> run: Run;
@group(0) @binding(1) var<storage, read> raw: array<u32>;
@group(0) @binding(2) var<storage, read_write> quants: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let pair = (group.y * groups.x + group.x) * 64u + thread;
    if pair * 2u >= run.count { return; }
    let block = run.first + pair * 2u;
    let at = pair * 9u;
    let low = four(at);
    let middle = raw[at + 4u];
    quants[block] = between(low, middle);
    var scale = low.x & 0xffffu;
    if pair * 2u + 1u < run.count {
        quants[block + 1u] = four(at + 5u);
        scale |= middle & 0xffff0000u;
    }
    scales[block / 2u] = scale;
}
