// This is included by the kernels that import weights as files store them. It is not a kernel.
//
// A run is what is imported at once: the blocks of some rows of a matrix, which lie in a buffer from its first byte on.
// A matrix, and the part of it that is bound, begins a run at an even block, so that a word of scales has one writer.
struct Run {
    first: u32,  // the number that the first block of the run has in the part
    count: u32,  // blocks
}
