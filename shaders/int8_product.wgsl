// This file is included by the kernels that multiply in 8-bit integers. It is not a kernel.

// A block of weights, as weights.wgsl has it, and one of a token's vector, as quantize.wgsl has it.
struct Weights {
    q: array<vec4<u32>, 2>,
    f: vec3<f32>,
}

struct Activations {
    low: vec4<u32>,
    high: vec4<u32>,
    f: vec2<f32>,
}

fn half_dot(a: vec4<u32>, b: vec4<u32>) -> f32 {
    return f32(dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w));
}

fn product(w: Weights, x: Activations) -> f32 {
    return x.f.x * (w.f.x * half_dot(w.q[0], x.low) + w.f.y * half_dot(w.q[1], x.high)) + x.f.y * w.f.z;
}
