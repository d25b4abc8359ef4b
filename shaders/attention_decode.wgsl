// Attention of one token of each sequence, with all that surrounds it at decode: QK-norm, RoPE, the cache write and
// softmax(q K^T) V.
//     q = SCALE rotate(q_weight * q / rms(q), p)      k = rotate(k_weight * k / rms(k), p)      v = v, or v / rms(v) if VALUE_NORM
//     out[h] = sum_j softmax_j(q[h] . k_j) v_j        over the last min(p + 1, WINDOW) positions j
// Position j lies in ring RING of the sequence (state.wgsl), which holds at least these positions.
//
// qkv f32 [sequences, HEADS + 2 KV_HEADS, HEAD_DIM], or [sequences, HEADS, HEAD_DIM] if SHARED: another layer has then written
// the keys and values of this position, too      norms f32 [2, HEAD_DIM]      rope: rope.wgsl
// key_cache, value_cache half [rows, KV_HEADS, HEAD_DIM]
// out f32 [sequences, SPLITS, HEADS, HEAD_DIM]      stats f32 [sequences, SPLITS, HEADS] of (max, sum)
// If SPLITS > 1, out has the softmax of a share of the positions, unnormalised, for attention_combine.wgsl. Else it has the
// result, and stats is left alone.
//
// Grid: x = split, y = up to 4 query heads of a key/value head, z = sequence. A workgroup of HEAD_DIM / 4 threads takes these
// heads together, so that the cache is read once; if a key/value head has more, several workgroups write the same new row. It goes over the positions in tiles of as many as it has
// threads: a thread scores one position for all heads, then gathers four elements of the output over all positions of the
// tile. The softmax is online, in f32.
override HEADS: u32;
override KV_HEADS: u32;
override HEAD_DIM: u32;
override EPS: f32;
override SCALE: f32;
override WINDOW: u32;
override RING: u32;
override SPLITS: u32;
override VALUE_NORM: bool;
override SHARED: bool;
override WORKGROUP_SIZE: u32;
override GROUP = HEADS / KV_HEADS;
override PARTS = (GROUP + 3u) / 4u;  // workgroups of a key/value head
override ROW_HEADS = HEADS + select(2u * KV_HEADS, 0u, SHARED);
override QUERY_VECTORS = 4u * WORKGROUP_SIZE;
#include "state.wgsl"
#include "reduce.wgsl"

@group(0) @binding(0) var<storage, read> states: array<State>;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> norms: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> key_cache: array<vec4<half>>;
@group(0) @binding(5) var<storage, read_write> value_cache: array<vec4<half>>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> stats: array<vec2<f32>>;
#include "rope.wgsl"

const LOWEST = -1e30;

var<workgroup> queries: array<vec4<f32>, QUERY_VECTORS>;
var<workgroup> weights: array<vec4<f32>, WORKGROUP_SIZE>;  // of a tile's positions, a component a head
var<workgroup> normed_keys: array<vec4<f32>, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let split = group.x;
    let kv_head = group.y / PARTS;
    let first_head = kv_head * GROUP + group.y % PARTS * 4u;
    let head_count = min((kv_head + 1u) * GROUP - first_head, 4u);
    let position = states[group.z].position;
    let ring = states[group.z].rings[RING];
    let qkv_start = group.z * ROW_HEADS;
    let length = min(position + 1u, WINDOW);
    let oldest_place = (position + 1u - length) % ring.capacity;
    let share = (length + SPLITS - 1u) / SPLITS;
    let first = min(split * share, length);
    let last = min(first + share, length);

    var heads: array<vec4<f32>, 4>;  // this thread's elements; zero if there are fewer heads
    var squares: vec4<f32>;
    for (var head = 0u; head < head_count; head++) {
        heads[head] = qkv[(qkv_start + first_head + head) * WORKGROUP_SIZE + thread];
        squares[head] = dot(heads[head], heads[head]);
    }
    var key = vec4(0.0);
    if !SHARED { key = qkv[(qkv_start + HEADS + kv_head) * WORKGROUP_SIZE + thread]; }
    let query_scale = SCALE * inverseSqrt(workgroup_sums(thread, squares) / f32(HEAD_DIM) + EPS);
    let key_scale = inverseSqrt(workgroup_sum(thread, dot(key, key)) / f32(HEAD_DIM) + EPS);
    for (var head = 0u; head < 4u; head++) {
        heads[head] *= query_scale[head] * norms[thread];
        queries[head * WORKGROUP_SIZE + thread] = heads[head];
    }
    let normed_key = key * key_scale * norms[WORKGROUP_SIZE + thread];
    normed_keys[thread] = normed_key;
    workgroupBarrier();
    let turn = turn_to(position, thread);
    for (var head = 0u; head < 4u; head++) {
        heads[head] = heads[head] * turn.cos + queries[head * WORKGROUP_SIZE + partner(thread)] * turn.sin;
    }
    let turned_key = normed_key * turn.cos + normed_keys[partner(thread)] * turn.sin;
    workgroupBarrier();
    for (var head = 0u; head < 4u; head++) { queries[head * WORKGROUP_SIZE + thread] = heads[head]; }
    if !SHARED {
        var value = qkv[(qkv_start + HEADS + KV_HEADS + kv_head) * WORKGROUP_SIZE + thread];
        if VALUE_NORM { value *= inverseSqrt(workgroup_sum(thread, dot(value, value)) / f32(HEAD_DIM) + EPS); }
        if first < length && last == length {  // the share with the new position
            let at = (ring_row(ring, position) * KV_HEADS + kv_head) * WORKGROUP_SIZE + thread;
            key_cache[at] = vec4<half>(turned_key);
            value_cache[at] = vec4<half>(value);
        }
    }
    storageBarrier();
    workgroupBarrier();

    var highest = vec4(LOWEST);
    var total = vec4(0.0);  // this thread's part of the sum
    var gathered: array<vec4<f32>, 4>;  // a vector a head
    for (var tile = first; tile < last; tile += WORKGROUP_SIZE) {
        var scores = vec4(LOWEST);
        if tile + thread < last {
            scores = vec4(0.0);
            let start = (ring_row_after(ring, oldest_place, tile + thread) * KV_HEADS + kv_head) * WORKGROUP_SIZE;
            for (var i = 0u; i < WORKGROUP_SIZE; i++) {
                let k = vec4<f32>(key_cache[start + i]);
                scores += vec4(
                    dot(queries[i], k),
                    dot(queries[WORKGROUP_SIZE + i], k),
                    dot(queries[2u * WORKGROUP_SIZE + i], k),
                    dot(queries[3u * WORKGROUP_SIZE + i], k),
                );
            }
        }
        let higher = max(highest, workgroup_max(thread, scores));
        let shrink = exp(highest - higher);
        highest = higher;
        let weight = select(vec4(0.0), exp(scores - highest), tile + thread < last);
        total = total * shrink + weight;
        weights[thread] = weight;
        workgroupBarrier();
        for (var head = 0u; head < 4u; head++) { gathered[head] *= shrink[head]; }
        for (var i = 0u; i < min(WORKGROUP_SIZE, last - tile); i++) {
            let row = ring_row_after(ring, oldest_place, tile + i) * KV_HEADS + kv_head;
            let v = vec4<f32>(value_cache[row * WORKGROUP_SIZE + thread]);
            for (var head = 0u; head < 4u; head++) { gathered[head] += weights[i][head] * v; }
        }
        workgroupBarrier();
    }

    let sums = workgroup_sums(thread, total);
    for (var head = 0u; head < head_count; head++) {
        let row = (group.z * SPLITS + split) * HEADS + first_head + head;
        if SPLITS == 1u {
            out[row * WORKGROUP_SIZE + thread] = gathered[head] / sums[head];
        } else {
            out[row * WORKGROUP_SIZE + thread] = gathered[head];
            if thread == 0u { stats[row] = vec2(highest[head], sums[head]); }
        }
    }
}
