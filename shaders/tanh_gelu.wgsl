// This file is included by the kernels that apply GELU. It is not a kernel.

// GELU in its tanh form: g (1 + tanh z) / 2 = g sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3). The clamp keeps exp
// finite: beyond it the sigmoid is 0 or 1 to the last bit of f32.
fn gelu(g: f32) -> f32 {
    let z = 0.7978845608028654 * (g + 0.044715 * g * g * g);
    return g / (1.0 + exp(clamp(-2.0 * z, -80.0, 80.0)));
}
