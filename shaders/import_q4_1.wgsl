// Blocks of a GGUF file in Q4_1 (ggml-quants.c, block_q4_1) become rows of the layout INT4_OFFSET, bit for bit:
//     block: f16 d, f16 m, 16 bytes of nibbles      quants[block] = the nibbles      scales[block] = d and m
//
// run: see import_run.wgsl      raw: 20 bytes a block
// quants: four words a block      scales: a word a block
// Only bits are moved. Grid: x * y workgroups of 64 threads. One thread has one block, which is five words.
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
    let block = (group.y * groups.x + group.x) * 64u + thread;
    if block >= run.count { return; }
    scales[run.first + block] = raw[block * 5u];
    quants[run.first + block] = four(block * 5u + 1u);
}
