// This file is included after weights.wgsl by the kernels that multiply by a vector x: array<vec4<f32>>. It is not a kernel.
// On CPU adapters, sharing.cpu.wgsl takes its place.
struct Place {
    @builtin(local_invocation_index) thread: u32,
}

// The 32 elements of x that the weights at block `block` of a row are multiplied by.
fn x_block(block: u32, place: Place) -> Block {
    let at = block * 8u;
    return Block(x[at], x[at + 1u], x[at + 2u], x[at + 3u], x[at + 4u], x[at + 5u], x[at + 6u], x[at + 7u]);
}
