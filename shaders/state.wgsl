// Included by the kernels that depend on where the sequence stands. Not a kernel.
//
// The step's tokens are those at positions [position, position + count). `first` is 0, but for the logits of a range of a
// prompt's tokens, where the final norm starts from that one.
struct State {
    position: u32,
    count: u32,
    first: u32,
}
