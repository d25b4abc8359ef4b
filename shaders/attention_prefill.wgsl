// Attention of a chunk of tokens over the cache and the chunk itself, softmax(q K^T) V as in flash attention
// (arXiv 2205.14135). It goes tile by tile, with an online softmax in f32, and never touches tiles outside the window.
//     out[i, h] = sum_j softmax_j(q[i, h] . k_j) v_j      over positions p + i - WINDOW < j <= p + last(i)
// The last token that token i of the chunk sees is SIGHT's to say: last(i) = i if it is CAUSAL, reach[i] if it is REACH, which
// must not fall as i rises, and the last one of the chunk if it is ALL.
// Keys and values before the chunk's first position p come from ring RING of the sequence (state.wgsl), those of the chunk
// from keys and values, so that a ring of just WINDOW rows suffices.
//
// queries half [max count, HEADS, HEAD_DIM], scaled      keys, values half [max count, KV_HEADS, HEAD_DIM]
// key_cache, value_cache half [rows, KV_HEADS, HEAD_DIM]      out half [max count, HEADS, HEAD_DIM]
// reach u32 [max count], read if SIGHT is REACH
// Grid: x = tiles of QUERIES tokens, y = key/value head. A workgroup of HEAD_DIM / 4 threads, or of more if a subgroup would
// not be full, takes ROWS = 16 rows, a row being a query head of a token, and goes over the keys in tiles of as many as it has
// threads. A thread scores one key for all rows, then takes a part of the softmax, then gathers four elements of the output of
// all rows.
override HEADS: u32;
override KV_HEADS: u32;
override WINDOW: u32;
override RING: u32;
override VECTORS: u32;  // HEAD_DIM / 4
override WORKGROUP_SIZE: u32;
override SIGHT: u32;
const CAUSAL = 0u;
const REACH = 1u;
const ALL = 2u;
override GROUP = HEADS / KV_HEADS;
override QUERIES = 16u / GROUP;
override TILE_VECTORS = 4u * WORKGROUP_SIZE;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> queries: array<vec4<half>>;
@group(0) @binding(2) var<storage, read> keys: array<vec4<half>>;
@group(0) @binding(3) var<storage, read> values: array<vec4<half>>;
@group(0) @binding(4) var<storage, read> key_cache: array<vec4<half>>;
@group(0) @binding(5) var<storage, read> value_cache: array<vec4<half>>;
@group(0) @binding(6) var<storage, read_write> out: array<vec4<half>>;
@group(0) @binding(7) var<storage, read> reach: array<u32>;

const LOWEST = -1e30;

// Four rows are one vector: tile[key * 4 + row / 4], first scores, then their exponentials.
var<workgroup> tile: array<vec4<f32>, TILE_VECTORS>;
var<workgroup> highest_of: array<vec4<f32>, WORKGROUP_SIZE>;
var<workgroup> shrink_of: array<vec4<f32>, 4>;

// The last token of the chunk that a token of it sees.
fn last_seen(token: u32) -> u32 {
    if SIGHT == CAUSAL { return token; }
    let last = state.count - 1u;
    if SIGHT == ALL { return last; }
    return reach[min(token, last)];
}

// Where row `row` of the tile of queries that begins at token `first` lies in queries and out, in vectors.
fn row_start(first: u32, kv_head: u32, row: u32) -> u32 {
    let token = min(first + row / GROUP, state.count - 1u);
    return (token * HEADS + kv_head * GROUP + row % GROUP) * VECTORS;
}

// Vector `i` of a row of queries.
fn query(first: u32, kv_head: u32, row: u32, i: u32) -> vec4<f32> {
    return vec4<f32>(queries[row_start(first, kv_head, row) + i]);
}

alias Rows = array<vec4<f32>, 16>;
#include "attention_tile.wgsl"

fn add_dot(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, place: Place) {
    let thread = place.thread;
    let first = group.x * QUERIES;
    let kv_head = group.y;
    if first >= state.count { return; }
    let start = state.position;
    let first_query = start + first;
    let first_key = max(first_query + 1u, WINDOW) - WINDOW;
    let end_key = start + last_seen(min(first + QUERIES, state.count) - 1u) + 1u;
    let ring = state.rings[RING];
    let first_place = first_key % ring.capacity;

    let quad = thread % 4u;  // in the softmax: rows 4 quad to 4 quad + 3, keys 4 part to 4 part + 3
    let part = thread / 4u;
    let vector = min(thread, VECTORS - 1u);
    var highest = vec4(LOWEST);
    var total = vec4(0.0);  // this part's share of the sum
    var gathered: array<vec4<f32>, 16>;
    for (var key_tile = first_key; key_tile < end_key; key_tile += WORKGROUP_SIZE) {
        let position = key_tile + thread;
        var scores = array<f32, 16>();  // naga would not zero it again each round without the initialiser
        let near = min(position, end_key - 1u);  // beyond, the score is dropped
        let in_chunk = near >= start;
        let row = select(ring_row_after(ring, first_place, near - first_key), near - start, in_chunk) * KV_HEADS + kv_head;
        for (var i = 0u; i < VECTORS; i++) {
            var k: vec4<f32>;
            if in_chunk {
                k = vec4<f32>(keys[row * VECTORS + i]);
            } else {
                k = vec4<f32>(key_cache[row * VECTORS + i]);
            }
            let q = query_rows(first, kv_head, i, place);
            scores[0] = add_dot(q[0], k, scores[0]);
            scores[1] = add_dot(q[1], k, scores[1]);
            scores[2] = add_dot(q[2], k, scores[2]);
            scores[3] = add_dot(q[3], k, scores[3]);
            scores[4] = add_dot(q[4], k, scores[4]);
            scores[5] = add_dot(q[5], k, scores[5]);
            scores[6] = add_dot(q[6], k, scores[6]);
            scores[7] = add_dot(q[7], k, scores[7]);
            scores[8] = add_dot(q[8], k, scores[8]);
            scores[9] = add_dot(q[9], k, scores[9]);
            scores[10] = add_dot(q[10], k, scores[10]);
            scores[11] = add_dot(q[11], k, scores[11]);
            scores[12] = add_dot(q[12], k, scores[12]);
            scores[13] = add_dot(q[13], k, scores[13]);
            scores[14] = add_dot(q[14], k, scores[14]);
            scores[15] = add_dot(q[15], k, scores[15]);
        }
        for (var row = 0u; row < 16u; row++) {
            let token = first + row / GROUP;
            if position > start + last_seen(token) || position + WINDOW <= start + token { scores[row] = LOWEST; }
        }
        for (var i = 0u; i < 4u; i++) {
            tile[thread * 4u + i] = vec4(scores[4u * i], scores[4u * i + 1u], scores[4u * i + 2u], scores[4u * i + 3u]);
        }
        workgroupBarrier();

        var higher = highest;
        for (var i = 0u; i < 4u; i++) { higher = max(higher, tile[(4u * part + i) * 4u + quad]); }
        highest_of[thread] = higher;
        workgroupBarrier();
        for (var i = quad; i < WORKGROUP_SIZE; i += 4u) { higher = max(higher, highest_of[i]); }
        let shrink = exp(highest - higher);
        highest = higher;
        if part == 0u { shrink_of[quad] = shrink; }
        total *= shrink;
        for (var i = 0u; i < 4u; i++) {
            let index = (4u * part + i) * 4u + quad;
            // A row whose keys all lie in later tiles has seen nothing: its exponentials would be of LOWEST - LOWEST.
            let weight = select(exp(tile[index] - highest), vec4(0.0), tile[index] == vec4(LOWEST));
            tile[index] = weight;
            total += weight;
        }
        workgroupBarrier();

        for (var row = 0u; row < 16u; row++) { gathered[row] *= shrink_of[row / 4u][row % 4u]; }
        for (var i = 0u; i < min(WORKGROUP_SIZE, end_key - key_tile); i++) {
            let key_position = key_tile + i;
            var v: vec4<f32>;
            if key_position >= start {
                v = vec4<f32>(values[((key_position - start) * KV_HEADS + kv_head) * VECTORS + vector]);
            } else {
                let row = ring_row_after(ring, first_place, key_position - first_key);
                v = vec4<f32>(value_cache[(row * KV_HEADS + kv_head) * VECTORS + vector]);
            }
            let weight = key_weights(i, place);
            gathered[0] += weight[0].x * v;
            gathered[1] += weight[0].y * v;
            gathered[2] += weight[0].z * v;
            gathered[3] += weight[0].w * v;
            gathered[4] += weight[1].x * v;
            gathered[5] += weight[1].y * v;
            gathered[6] += weight[1].z * v;
            gathered[7] += weight[1].w * v;
            gathered[8] += weight[2].x * v;
            gathered[9] += weight[2].y * v;
            gathered[10] += weight[2].z * v;
            gathered[11] += weight[2].w * v;
            gathered[12] += weight[3].x * v;
            gathered[13] += weight[3].y * v;
            gathered[14] += weight[3].z * v;
            gathered[15] += weight[3].w * v;
        }
        workgroupBarrier();
    }

    highest_of[thread] = total;
    workgroupBarrier();
    for (var row = 0u; row < 16u; row++) {
        if row >= QUERIES * GROUP || first + row / GROUP >= state.count { break; }
        var sum = 0.0;
        for (var i = row / 4u; i < WORKGROUP_SIZE; i += 4u) { sum += highest_of[i][row % 4u]; }
        if thread < VECTORS { out[row_start(first, kv_head, row) + thread] = vec4<half>(gathered[row] / sum); }
    }
}
