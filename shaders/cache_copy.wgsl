// This copies the keys and values of some positions from one ring of a cache to another one, which does not overlap it. It
// is needed if a sequence outgrows its ring, or begins like another one.
//     cache[destination, p] = cache[origin, p]     for positions first <= p < first + count
//
// key_cache, value_cache half [rows, SIZE]
// Grid: x * y workgroups of 64 threads cover count * SIZE / 4 vectors of four.
override SIZE: u32;
#include "state.wgsl"

struct Copy {
    origin: Ring,
    destination: Ring,
    first: u32,
    count: u32,
}

@group(0) @binding(0) var<storage, read> copy: Copy;
@group(0) @binding(1) var<storage, read_write> key_cache: array<vec4<half>>;
@group(0) @binding(2) var<storage, read_write> value_cache: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let size = SIZE / 4u;
    let index = (group.y * groups.x + group.x) * 64u + thread;
    if index >= copy.count * size { return; }
    let position = copy.first + index / size;
    let old_at = ring_row(copy.origin, position) * size + index % size;
    let new_at = ring_row(copy.destination, position) * size + index % size;
    key_cache[new_at] = key_cache[old_at];
    value_cache[new_at] = value_cache[old_at];
}
