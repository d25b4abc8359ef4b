// A convolution of each channel by itself:
//     out[t, c] = SCALE sum_ij weight[i, j, c] x[r STRIDE + i - PAD, q STRIDE + j - PAD, c]      for t < count
// accumulated in f32, with x = 0 outside of the image, and pixel first + t in row r and column q of what is made. `first` is
// the state's position: out is a band of that.
//
// x half [SIDE * SIDE, CHANNELS], row by row      weight f32 [KERNEL, KERNEL, CHANNELS]      out f32 [max count, CHANNELS]
// Grid: x = vectors of four / 64, y = pixel.
override CHANNELS: u32;
override KERNEL: u32;
override STRIDE: u32;
override PAD: u32;
override SIDE: u32;
override OUT_SIDE: u32;
override SCALE: f32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<vec4<half>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    let size = CHANNELS / 4u;
    if id.x >= size || id.y >= state.count { return; }
    let pixel = state.position + id.y;
    let top = pixel / OUT_SIDE * STRIDE;
    let left = pixel % OUT_SIDE * STRIDE;
    var sum = vec4(0.0);
    for (var i = 0u; i < KERNEL; i++) {
        let row = top + i - PAD;  // before the image's beginning, it wraps to beyond its end
        if row >= SIDE { continue; }
        for (var j = 0u; j < KERNEL; j++) {
            let col = left + j - PAD;
            if col >= SIDE { continue; }
            sum += weight[(i * KERNEL + j) * size + id.x] * vec4<f32>(x[(row * SIDE + col) * size + id.x]);
        }
    }
    out[id.y * size + id.x] = sum * SCALE;
}
