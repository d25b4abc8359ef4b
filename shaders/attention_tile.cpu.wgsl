// This file is included by attention_prefill.wgsl: what all threads of a workgroup read alike. It is not a kernel.
//
// It is for CPU adapters, like sharing.cpu.wgsl: a thread loads a share, and hands it to the others of its subgroup.
struct Place {
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

// Vector `i` of the 16 rows of queries.
fn query_rows(first: u32, kv_head: u32, i: u32, place: Place) -> Rows {
    if place.subgroup_size < 8u {
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
    let a = query(first, kv_head, place.in_subgroup % 8u, i);
    let b = query(first, kv_head, place.in_subgroup % 8u + 8u, i);
    return Rows(
        subgroupShuffle(a, 0u), subgroupShuffle(a, 1u),
        subgroupShuffle(a, 2u), subgroupShuffle(a, 3u),
        subgroupShuffle(a, 4u), subgroupShuffle(a, 5u),
        subgroupShuffle(a, 6u), subgroupShuffle(a, 7u),
        subgroupShuffle(b, 0u), subgroupShuffle(b, 1u),
        subgroupShuffle(b, 2u), subgroupShuffle(b, 3u),
        subgroupShuffle(b, 4u), subgroupShuffle(b, 5u),
        subgroupShuffle(b, 6u), subgroupShuffle(b, 7u),
    );
}

// The weights of the 16 rows for key `key` of the tile, four rows a vector.
fn key_weights(key: u32, place: Place) -> array<vec4<f32>, 4> {
    let mine = tile[4u * key + place.in_subgroup % 4u];  // no subgroup is smaller than 4
    return array(
        subgroupShuffle(mine, 0u), subgroupShuffle(mine, 1u), subgroupShuffle(mine, 2u), subgroupShuffle(mine, 3u));
}
