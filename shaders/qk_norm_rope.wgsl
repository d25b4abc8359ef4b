// This makes the queries, keys and values of a prompt's tokens ready for attention:
//     q = SCALE rotate(q_weight * q / rms(q), position)      k = rotate(k_weight * k / rms(k), position)
//     v = v, or v / rms(v) if VALUE_NORM
//
// qkv f32 [max count, HEADS + 2 KV_HEADS, HEAD_DIM], or [max count, HEADS, HEAD_DIM] if SHARED: the layer then has no keys
// and values of its own      norms f32 [2, HEAD_DIM]: q_weight, k_weight (1 + w of the report)
// rope: rope.wgsl      queries half [max count, HEADS, HEAD_DIM]      keys, values half [max count, KV_HEADS, HEAD_DIM]
// Grid: x = head of qkv, y = token. A workgroup of HEAD_DIM / 4 threads has one head.
override HEADS: u32;
override KV_HEADS: u32;
override HEAD_DIM: u32;
override EPS: f32;
override SCALE: f32;
override VALUE_NORM: bool;
override SHARED: bool;
override WORKGROUP_SIZE: u32;
override ROW_HEADS = HEADS + select(2u * KV_HEADS, 0u, SHARED);
#include "state.wgsl"
#include "reduce.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> norms: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> rope: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> queries: array<vec4<half>>;
@group(0) @binding(5) var<storage, read_write> keys: array<vec4<half>>;
@group(0) @binding(6) var<storage, read_write> values: array<vec4<half>>;
#include "rope.wgsl"

var<workgroup> scratch: array<vec4<f32>, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = group.x;
    let token = group.y;
    if token >= state.count { return; }
    let value = qkv[(token * ROW_HEADS + head) * WORKGROUP_SIZE + thread];
    if head >= HEADS + KV_HEADS {
        let kv_head = head - HEADS - KV_HEADS;
        var scale = 1.0;
        if VALUE_NORM { scale = inverseSqrt(workgroup_sum(thread, dot(value, value)) / f32(HEAD_DIM) + EPS); }
        values[(token * KV_HEADS + kv_head) * WORKGROUP_SIZE + thread] = vec4<half>(value * scale);
        return;
    }
    let is_key = head >= HEADS;
    let weight = norms[select(0u, WORKGROUP_SIZE, is_key) + thread];
    let mean = workgroup_sum(thread, dot(value, value)) / f32(HEAD_DIM);
    let normed = value * inverseSqrt(mean + EPS) * weight;
    scratch[thread] = normed;
    workgroupBarrier();
    let turn = turn_to(state.position + token, thread);
    let turned = normed * turn.cos + scratch[partner(thread)] * turn.sin;
    if is_key {
        keys[(token * KV_HEADS + head - HEADS) * WORKGROUP_SIZE + thread] = vec4<half>(turned);
    } else {
        queries[(token * HEADS + head) * WORKGROUP_SIZE + thread] = vec4<half>(turned * SCALE);
    }
}
