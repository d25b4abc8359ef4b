// GeGLU of each token, of which only the gates far above the others are let through (Gemma 3n, Spark Transformer, arXiv
// 2506.06644, section 3.1): those CUT standard deviations above the mean of the token's gates.
//     sparse(g) = max(g - (mean(g) + CUT std(g)), 0)      out[t, i] = SCALE gelu(sparse(gate[t])[i]) * up[t, i]
// with std(g) = sqrt(mean((g - mean(g))^2)).
//
// gate_up f32 [max count, 2 SIZE]      out half [max count, SIZE]
// SCALE, a power of two, keeps the product inside f16; the matmul that follows takes it back.
// Grid: one workgroup a token.
override WORKGROUP_SIZE: u32;
override SIZE: u32;
override CUT: f32;
override SCALE: f32;
#include "reduce.wgsl"
#include "state.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> gate_up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= state.count { return; }
    let size = SIZE / 4u;
    let start = group.x * 2u * size;
    var sum = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) { sum += dot(gate_up[start + i], vec4(1.0)); }
    let mean = workgroup_sum(thread, sum) / f32(SIZE);
    var squares = 0.0;
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let centred = gate_up[start + i] - mean;
        squares += dot(centred, centred);
    }
    let cut = mean + CUT * sqrt(workgroup_sum(thread, squares) / f32(SIZE));
    for (var i = thread; i < size; i += WORKGROUP_SIZE) {
        let gate = max(gate_up[start + i] - cut, vec4(0.0));
        let activated = vec4(gelu(gate.x), gelu(gate.y), gelu(gate.z), gelu(gate.w));
        out[group.x * size + i] = vec4<half>(activated * gate_up[start + size + i] * SCALE);
    }
}
