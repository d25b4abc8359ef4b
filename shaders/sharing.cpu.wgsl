// This file is included after weights.wgsl by the kernels that multiply by a vector x: array<vec4<f32>>. It is not a kernel.
//
// It is for CPU adapters, on which LANES is 1 and all threads are at the same block. They run a subgroup as one vector, but
// load for each of its threads in turn, even if all load the same. So each thread loads an eighth of the block and hands it to
// the others, which takes one instruction.
struct Place {
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

// The 32 elements of x that the weights at block `block` of a row are multiplied by.
fn x_block(block: u32, place: Place) -> Block {
    let at = block * 8u;
    if place.subgroup_size < 8u {
        return Block(x[at], x[at + 1u], x[at + 2u], x[at + 3u], x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]);
    }
    let mine = x[at + place.in_subgroup % 8u];
    return Block(
        subgroupShuffle(mine, 0u), subgroupShuffle(mine, 1u), subgroupShuffle(mine, 2u), subgroupShuffle(mine, 3u),
        subgroupShuffle(mine, 4u), subgroupShuffle(mine, 5u), subgroupShuffle(mine, 6u), subgroupShuffle(mine, 7u),
    );
}
