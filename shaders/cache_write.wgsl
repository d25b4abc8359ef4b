// This writes the keys and values of a prompt's tokens to the cache, after their attention: position p goes to its row in
// ring RING of the sequence (state.wgsl). If a chunk is longer than the ring, its last tokens remain.
//
// keys, values half [max count, SIZE]      key_cache, value_cache half [rows, SIZE]
// Grid: x = vectors of four of a token / 64, y = token.
override SIZE: u32;
override RING: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> keys: array<vec4<half>>;
@group(0) @binding(2) var<storage, read> values: array<vec4<half>>;
@group(0) @binding(3) var<storage, read_write> key_cache: array<vec4<half>>;
@group(0) @binding(4) var<storage, read_write> value_cache: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    let ring = state.rings[RING];
    if id.x >= size || id.y >= state.count || id.y + ring.capacity < state.count { return; }
    let at = ring_row(ring, state.position + id.y) * size + id.x;
    key_cache[at] = keys[id.y * size + id.x];
    value_cache[at] = values[id.y * size + id.x];
}
