// Included by the kernels that depend on where the sequence stands. Not a kernel.
//
// The step's tokens are those at positions [position, position + count).
struct State {
    position: u32,
    count: u32,
}
