// This file is included by the kernels that apply a sigmoid. It is not a kernel.

// The clamp keeps exp finite: beyond it the sigmoid is 0 or 1 to the last bit of f32.
fn sigmoid(x: vec4<f32>) -> vec4<f32> {
    return 1.0 / (1.0 + exp(clamp(-x, vec4(-80.0), vec4(80.0))));
}
