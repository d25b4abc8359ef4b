// This file is included by attention_prefill.wgsl: what all threads of a workgroup read alike. It is not a kernel.
struct Place {
    @builtin(local_invocation_index) thread: u32,
}

// Vector `i` of the 16 rows of queries.
fn query_rows(first: u32, kv_head: u32, i: u32, place: Place) -> Rows {
    return Rows(
        query(first, kv_head, 0u, i), query(first, kv_head, 1u, i),
        query(first, kv_head, 2u, i), query(first, kv_head, 3u, i),
        query(first, kv_head, 4u, i), query(first, kv_head, 5u, i),
        query(first, kv_head, 6u, i), query(first, kv_head, 7u, i),
        query(first, kv_head, 8u, i), query(first, kv_head, 9u, i),
        query(first, kv_head, 10u, i), query(first, kv_head, 11u, i),
        query(first, kv_head, 12u, i), query(first, kv_head, 13u, i),
        query(first, kv_head, 14u, i), query(first, kv_head, 15u, i),
    );
}

// The weights of the 16 rows for key `key` of the tile, four rows a vector.
fn key_weights(key: u32, place: Place) -> array<vec4<f32>, 4> {
    return array(tile[4u * key], tile[4u * key + 1u], tile[4u * key + 2u], tile[4u * key + 3u]);
}
