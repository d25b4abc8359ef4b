// The end of a block of an image encoder: what it made of each pixel is scaled by channel, and added to what came in.
//     z = y / rms(y) if NORMED, else y
//     out[first + t] = weight * z, plus residual[first + t] if ADD      copy = SCALE out      for t < count
// with rms(v) = sqrt(mean(v^2) + eps), in f32. `first` is the state's position: y is a band of the image, the others are all.
// `weight` is the product of the norm's weight and of the layer scale (arXiv 2103.17239), as far as there are any.
//
// y f32 [max count, K]      norm f32 [2, K]: weight, and nothing that is read
// residual, out f32 [all pixels, K]      copy half [all pixels, K]: what matrices read. It is written if COPY.
// SCALE, a power of two, keeps the copy inside f16: it is of no norm. The kernel that follows takes it back.
// Grid: x * y workgroups; LANES threads share a pixel.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override K: u32;
override EPS: f32;
override NORMED: bool;
override ADD: bool;
override COPY: bool;
override SCALE: f32;
#include "lanes.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> residual: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> copy: array<vec4<half>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let size = K / 4u;
    let pixel = lane_row(group, groups, thread);
    let begin = min(pixel, state.count - 1u) * size;
    var scale = 1.0;
    if NORMED {
        var squares = 0.0;
        for (var i = thread % LANES; i < size; i += LANES) { squares += dot(y[begin + i], y[begin + i]); }
        scale = inverseSqrt(lane_sum(thread, squares) / f32(K) + EPS);
    }
    if pixel >= state.count { return; }
    let to = (state.position + pixel) * size;
    for (var i = thread % LANES; i < size; i += LANES) {
        var sum = y[begin + i] * scale * norm[i];
        if ADD { sum += residual[to + i]; }
        out[to + i] = sum;
        if COPY { copy[to + i] = vec4<half>(sum * SCALE); }
    }
}
