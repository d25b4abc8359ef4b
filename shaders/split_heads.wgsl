// This takes the queries, keys and values of an encoder's tokens apart, and scales the queries:
//     queries[t] = SCALE qkv[t, 0]      keys[t] = qkv[t, 1]      values[t] = qkv[t, 2]
//
// qkv f32 [max count, 3, SIZE]      queries, keys, values half [max count, SIZE]
// Grid: x = vectors of four / 64, y = token.
override SIZE: u32;
override SCALE: f32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> queries: array<vec4<half>>;
@group(0) @binding(3) var<storage, read_write> keys: array<vec4<half>>;
@group(0) @binding(4) var<storage, read_write> values: array<vec4<half>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = SIZE / 4u;
    if id.x >= size || id.y >= state.count { return; }
    let out = id.y * size + id.x;
    let row = id.y * 3u * size + id.x;
    queries[out] = vec4<half>(qkv[row] * SCALE);
    keys[out] = vec4<half>(qkv[row + size]);
    values[out] = vec4<half>(qkv[row + 2u * size]);
}
