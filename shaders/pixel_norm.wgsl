// RMSNorm of each pixel over its channels, and the activation behind it (MobileNetV4, arXiv 2404.10518):
//     n = weight * x / rms(x)      out[first + t] = SCALE n, or SCALE gelu(n) if GELU      for t < count
// with rms(v) = sqrt(mean(v^2) + eps), in f32. `first` is the state's position: x is a band of the image, and out all of it.
//
// x f32 [max count, K]      norm f32 [2, K]: weight, and nothing that is read      out half [all pixels, K]
// SCALE, a power of two, keeps the result inside f16; the kernel that follows takes it back.
// Grid: x * y workgroups; LANES threads share a pixel.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override K: u32;
override EPS: f32;
override GELU: bool;
override SCALE: f32;
#include "lanes.wgsl"
#include "state.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> norm: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let size = K / 4u;
    let pixel = lane_row(group, groups, thread);
    let begin = min(pixel, state.count - 1u) * size;
    var squares = 0.0;
    for (var i = thread % LANES; i < size; i += LANES) { squares += dot(x[begin + i], x[begin + i]); }
    let scale = inverseSqrt(lane_sum(thread, squares) / f32(K) + EPS);
    if pixel >= state.count { return; }
    let to = (state.position + pixel) * size;
    for (var i = thread % LANES; i < size; i += LANES) {
        var n = x[begin + i] * scale * norm[i];
        if GELU { n = vec4(gelu(n.x), gelu(n.y), gelu(n.z), gelu(n.w)); }
        out[to + i] = vec4<half>(n * SCALE);
    }
}
