// A 3 x 3 convolution that halves the frames and the bands of a sound (Universal Speech Model, arXiv 2303.01037, as Gemma 3n
// has it), and the moments of each frame that it makes, which the norm after it needs:
//     out[t, f, o] = sum_ijc weight[i, j, c, o] x[2 t + i, 2 f + j - 1, c]      for t < count / 2, rounded up
//     moments[t] = (mean m of out[t], sum of (out[t] - m)^2)
// accumulated in f32, with x = 0 outside: there are two more frames after the last one, none before the first, and one more
// band on either side.
//
// x half [count, BANDS, IN]      weight f32 [3, 3, IN, OUT]      out f32 [max count / 2, BANDS / 2, OUT], both rounded up
// moments f32 [max count / 2, 2]
// A matrix product would want 9 copies of x, twice as large as anything else of the encoder, and the convolutions are a
// five-hundredth of its work: so this reads x directly.
// Grid: one workgroup a frame of out. A thread computes four bands by four channels at a time.
override WORKGROUP_SIZE: u32;
override BANDS: u32;
override IN: u32;
override OUT: u32;
#include "reduce.wgsl"
#include "state.wgsl"

@group(0) @binding(0) var<storage, read> state: State;
@group(0) @binding(1) var<storage, read> x: array<half>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> moments: array<vec2<f32>>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let frame = group.x;
    if 2u * frame >= state.count { return; }
    let bands = (BANDS + 1u) / 2u;
    let vectors = OUT / 4u;
    let start = frame * bands * vectors;
    let tiles = (bands + 3u) / 4u * vectors;

    var sum = 0.0;
    for (var tile = thread; tile < tiles; tile += WORKGROUP_SIZE) {
        let vector = tile % vectors;
        let first = tile / vectors * 4u;
        var a = vec4(0.0);
        var b = vec4(0.0);
        var c = vec4(0.0);
        var d = vec4(0.0);
        for (var i = 0u; i < 3u; i++) {
            if 2u * frame + i >= state.count { break; }
            for (var j = 0u; j < 3u; j++) {
                let band = 2u * (first + vec4(0u, 1u, 2u, 3u)) + j - 1u;  // -1 wraps, and is outside too
                let inside = select(vec4(0.0), vec4(1.0), band < vec4(BANDS));
                let at = ((2u * frame + i) * BANDS + min(band, vec4(BANDS - 1u))) * IN;
                for (var channel = 0u; channel < IN; channel++) {
                    let w = weight[((i * 3u + j) * IN + channel) * vectors + vector];
                    let v = inside * vec4(
                        f32(x[at.x + channel]), f32(x[at.y + channel]), f32(x[at.z + channel]), f32(x[at.w + channel]));
                    a += v.x * w;
                    b += v.y * w;
                    c += v.z * w;
                    d += v.w * w;
                }
            }
        }
        let made = array(a, b, c, d);
        for (var i = 0u; i < min(4u, bands - first); i++) {
            out[start + (first + i) * vectors + vector] = made[i];
            sum += dot(made[i], vec4(1.0));
        }
    }
    let mean = workgroup_sum(thread, sum) / f32(bands * OUT);
    var squares = 0.0;
    for (var tile = thread; tile < tiles; tile += WORKGROUP_SIZE) {
        let first = tile / vectors * 4u;
        for (var i = 0u; i < min(4u, bands - first); i++) {
            let centred = out[start + (first + i) * vectors + tile % vectors] - mean;
            squares += dot(centred, centred);
        }
    }
    squares = workgroup_sum(thread, squares);
    if thread == 0u { moments[frame] = vec2(mean, squares); }
}
