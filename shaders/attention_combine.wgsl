// This makes one softmax of the shares that attention_decode.wgsl computed:
//     out[h] = sum_s e^(max_s - max) acc_s[h] / sum_s e^(max_s - max) sum_s
//
// Each sequence has
// shares f32 [SPLITS, HEADS, HEAD_DIM]      stats f32 [SPLITS, HEADS] of (max, sum)      out f32 [HEADS, HEAD_DIM]
// Grid: x = head, y = sequence. A workgroup of HEAD_DIM / 4 threads.
override HEADS: u32;
override SPLITS: u32;
override WORKGROUP_SIZE: u32;

@group(0) @binding(0) var<storage, read> shares: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let head = group.x;
    let first = group.y * SPLITS * HEADS + head;
    var highest = stats[first].x;
    for (var split = 1u; split < SPLITS; split++) {
        highest = max(highest, stats[first + split * HEADS].x);
    }
    var gathered = vec4(0.0);
    var sum = 0.0;
    for (var split = 0u; split < SPLITS; split++) {
        let row = first + split * HEADS;
        let weight = exp(stats[row].x - highest);
        gathered += weight * shares[row * WORKGROUP_SIZE + thread];
        sum += weight * stats[row].y;
    }
    out[(group.y * HEADS + head) * WORKGROUP_SIZE + thread] = gathered / sum;
}
