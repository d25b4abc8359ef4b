// This file is included by the kernels that depend on where a sequence stands. It is not a kernel.
//
// A step's tokens are those at positions [position, position + count) of a sequence. Several sequences that take a step
// together have a State and one token each. `slot` is the sequence's place in the buffers that keep something for each
// sequence from step to step, and `token` is the token that was chosen last.
//
// A cache is one array of rows, of which each sequence has some: a ring of `capacity` rows from row `start` on, where
// position p lies at row start + p % capacity. Layers with a sliding window use rings[0], layers without one rings[1].
struct Ring {
    start: u32,
    capacity: u32,
}

struct State {
    position: u32,
    count: u32,
    slot: u32,
    token: u32,
    rings: array<Ring, 2>,
}

// The row of a position.
fn ring_row(ring: Ring, position: u32) -> u32 {
    return ring.start + position % ring.capacity;
}

// The row of the position that comes `offset` (less than the capacity) after the one at row start + `place`. A loop over
// positions needs no division so.
fn ring_row_after(ring: Ring, place: u32, offset: u32) -> u32 {
    let row = place + offset;
    return ring.start + select(row, row - ring.capacity, row >= ring.capacity);
}
