// What a full convolution sees of each pixel that it makes, side by side, so that the convolution is a matrix product:
//     out[t, (c KERNEL + i) KERNEL + j] = x[r STRIDE + i - PAD, q STRIDE + j - PAD, c], and 0 outside of the image
// for t < count, with pixel first + t in row r and column q of what the convolution makes. `first` is the state's position:
// out is a band of that. The order of the columns is that of the weights in files, (rows, channels, height, width).
//
// x half [SIDE * SIDE, CHANNELS], row by row      out half [max count, STRIDE_OUT], zero beyond KERNEL^2 CHANNELS
// A band goes through the matrix before the next one is gathered, so that the KERNEL^2 copies of an image never exist.
// Grid: x = vectors of four / 64, y = pixel.
override CHANNELS: u32;
override KERNEL: u32;
override STRIDE: u32;
override PAD: u32;
override SIDE: u32;
override OUT_SIDE: u32;
override STRIDE_OUT: u32;
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<half>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<half>>;

// Column `column` of what the pixel in row `r` and column `q` sees.
fn seen(r: u32, q: u32, column: u32) -> half {
    let tap = column % (KERNEL * KERNEL);
    let channel = column / (KERNEL * KERNEL);
    let row = r * STRIDE + tap / KERNEL - PAD;  // before the image's beginning, it wraps to beyond its end
    let col = q * STRIDE + tap % KERNEL - PAD;
    if channel >= CHANNELS || row >= SIDE || col >= SIDE { return half(0.0); }
    return x[(row * SIDE + col) * CHANNELS + channel];
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= STRIDE_OUT / 4u || id.y >= state.count { return; }
    let pixel = state.position + id.y;
    let r = pixel / OUT_SIDE;
    let q = pixel % OUT_SIDE;
    let column = 4u * id.x;
    out[id.y * (STRIDE_OUT / 4u) + id.x] = vec4<half>(
        seen(r, q, column), seen(r, q, column + 1u), seen(r, q, column + 2u), seen(r, q, column + 3u));
}
