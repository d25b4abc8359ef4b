// Included by the kernels that depend on where the sequence stands. Not a kernel.
//
// The step's tokens are those at positions [position, position + count). `first` is 0, but for the logits of a range of a
// prompt's tokens, where the final norm starts from that one. Where several sequences take a step together, there is one
// for each, of one token, and `slot` is its place in the caches and the other buffers that have one for each sequence.
// `token` is the one that was chosen last.
struct State {
    position: u32,
    count: u32,
    first: u32,
    slot: u32,
    token: u32,
}
