// Included by the kernels that normalise and rotate query and key heads. Not a kernel.
// The including file sets HEAD_DIM, EPS and WORKGROUP_SIZE = HEAD_DIM / 4, and includes reduce.wgsl.
//
// `rope` holds (cos, sin) of position * frequency for the positions 0 to 255, then for the multiples of 256; a rotation
// by any position is one of each. The table is computed in float64, since f32 angles are off by 1e-3 at position 32768.
var<workgroup> rope_scratch: array<vec4<f32>, WORKGROUP_SIZE>;

fn rotation(position: u32, frequency: u32) -> vec2<f32> {
    let low = rope[(position % 256u) * (HEAD_DIM / 2u) + frequency];
    let high = rope[(256u + position / 256u) * (HEAD_DIM / 2u) + frequency];
    return vec2(high.x * low.x - high.y * low.y, high.y * low.x + high.x * low.y);
}

// RMSNorm of a head, then its rotation in halves: (a, b) -> (a cos - b sin, b cos + a sin). Thread t has elements 4t to
// 4t + 3 of the head in `value` and of the norm's weight in `weight`, and gets those of the result.
fn norm_and_rotate(thread: u32, value: vec4<f32>, weight: vec4<f32>, position: u32) -> vec4<f32> {
    let mean = workgroup_sum(thread, dot(value, value)) / f32(HEAD_DIM);
    let normalized = value * inverseSqrt(mean + EPS) * weight;
    rope_scratch[thread] = normalized;
    workgroupBarrier();
    let other = rope_scratch[(thread + WORKGROUP_SIZE / 2u) % WORKGROUP_SIZE];
    workgroupBarrier();
    let sign = select(1.0, -1.0, thread < WORKGROUP_SIZE / 2u);
    let frequency = (4u * thread) % (HEAD_DIM / 2u);
    var out: vec4<f32>;
    for (var i = 0u; i < 4u; i++) {
        let turn = rotation(position, frequency + i);
        out[i] = normalized[i] * turn.x + sign * other[i] * turn.y;
    }
    return out;
}
