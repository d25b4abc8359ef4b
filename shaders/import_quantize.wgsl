// Rows of plain floats are rounded to the layout INT8 or INT4, block by block. d is rounded to f16, to the nearest and
// from halfway to the even one; then q is rounded for that d in the same way:
//     INT8:  d = max |w| / 127                        q = w / d, from -127 to 127
//     INT4:  d = w / -8 of the w whose |w| is largest, the first one of several      q = w / d, from -8 to 7
// A block whose d rounds to zero is zero. q and d are the same on all devices, since quotients, which WGSL lets be a
// little off, only propose them: they are decided by comparing w with products that float32 holds exactly.
//
// run: see import_run.wgsl      raw: 32 numbers a block in the layout SOURCE, which is F32, F16 or BF16
// quants: eight words a block, or four      scales: a word for two blocks, zero in its high half after an odd last block
// faults u32 [1]: set to 1 if a weight is not finite or d is beyond f16; the block is then made zero
// Grid: x * y workgroups of 64 threads. One thread has two blocks.
override SOURCE: u32;
override LAYOUT: u32;
const F32 = 0u;
const F16 = 1u;
const INT8 = 3u;

#include "import_run.wgsl"

@group(0) @binding(0) var<storage, read> run: Run;
@group(0) @binding(1) var<storage, read> raw: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read_write> quants: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;
@group(0) @binding(4) var<storage, read_write> faults: atomic<u32>;

// The float32 bits of finite float16 numbers without a sign. unpack2x16float may take small ones for zero.
fn widened(halves: vec4<u32>) -> vec4<u32> {
    let small = bitcast<vec4<u32>>(vec4<f32>(halves) * 5.9604644775390625e-8);  // 2^-24
    return select((halves << vec4(13u)) + vec4(0x38000000u), small, halves < vec4(0x400u));
}

fn value(half_bits: u32) -> f32 {
    return bitcast<f32>(widened(vec4(half_bits)).x);
}

// The float32 bits of weights 4i to 4i + 3 of a block.
fn weights(block: u32, i: u32) -> vec4<u32> {
    if SOURCE == F32 {
        let at = block * 16u + i * 2u;
        return vec4(raw[at], raw[at + 1u]);
    }
    let words = raw[block * 8u + i];
    let tops = vec4(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u);
    if SOURCE != F16 { return tops; }
    let halves = (tops >> vec4(16u)) & vec4(0x7fffu);
    let endless = select(vec4(0u), vec4(0x7f800000u), halves >= vec4(0x7c00u));  // infinities and NaN
    return (tops & vec4(0x80000000u)) | widened(halves) | endless;
}

fn farther(a: u32, b: u32) -> u32 {
    return select(a, b, (b << 1u) > (a << 1u));
}

// The bits of the f16 that is nearest to x / levels.
fn scale_bits(x: f32, levels: f32) -> u32 {
    let quotient = x / levels;
    var below: u32;
    if quotient < 6.103515625e-5 {  // 2^-14: f16 has steps of 2^-24 there
        below = u32(quotient * 16777216.0);
    } else {
        below = (bitcast<u32>(quotient) - 0x38000000u) >> 13u;
    }
    let halfway = (value(below) + value(below + 1u)) * (0.5 * levels);
    return below + select(0u, 1u, x > halfway || (x == halfway && below % 2u == 1u));
}

// The whole numbers, of a limited range, that are nearest to x / d, with d above zero.
fn nearest(x: vec4<f32>, d: f32, low: f32, high: f32) -> vec4<f32> {
    let inverse = 1.0 / d;
    let q = clamp(round(x * inverse), vec4(low), vec4(high));
    let above = (q + 0.5) * d;
    let below = (q - 0.5) * d;
    let odd = (vec4<i32>(q) & vec4(1)) != vec4(0);
    let up = select(vec4(0.0), vec4(1.0), (x > above) | ((x == above) & odd));
    let down = select(vec4(0.0), vec4(1.0), (x < below) | ((x == below) & odd));
    return clamp(q + up - down, vec4(low), vec4(high));
}

// The numbers of weights 4i to 4i + 3, as the signed bytes of a word.
fn word(block: u32, i: u32, flip: u32, d: f32, low: f32, high: f32) -> u32 {
    if d == 0.0 { return 0u; }
    let q = vec4<u32>(vec4<i32>(nearest(bitcast<vec4<f32>>(weights(block, i) ^ vec4(flip)), d, low, high)));
    let bytes = (q & vec4(0xffu)) << vec4(0u, 8u, 16u, 24u);
    return bytes.x | bytes.y | bytes.z | bytes.w;
}

// Word i of a block in INT4: q + 8 of weights 4i to 4i + 3, and above each that of the weight sixteen on.
fn nibbles(block: u32, i: u32, flip: u32, d: f32) -> u32 {
    // The low four bits of q + 8 are those of q, with bit 3 turned over.
    let low = (word(block, i, flip, d, -8.0, 7.0) ^ 0x08080808u) & 0x0f0f0f0fu;
    let high = (word(block, i + 4u, flip, d, -8.0, 7.0) ^ 0x08080808u) & 0x0f0f0f0fu;
    return low | (high << 4u);
}

// Writes the numbers of a block, and returns its d as f16. `block` counts from the beginning of `raw`.
fn quantize(block: u32) -> u32 {
    var outermost = 0u;
    for (var i = 0u; i < 8u; i++) {
        let w = weights(block, i);
        outermost = farther(farther(farther(farther(outermost, w.x), w.y), w.z), w.w);
    }
    let levels = select(8.0, 127.0, LAYOUT == INT8);
    // From here on f16 rounds up to infinity.
    if (outermost & 0x7fffffffu) >= bitcast<u32>(levels * 65520.0) {
        atomicStore(&faults, 1u);
        outermost = 0u;
    }
    let scale = scale_bits(bitcast<f32>(outermost & 0x7fffffffu), levels);
    let d = value(scale);
    let out = run.first + block;
    if LAYOUT == INT8 {
        for (var i = 0u; i < 8u; i += 4u) {
            quants[out * 2u + i / 4u] = vec4(
                word(block, i, 0u, d, -127.0, 127.0), word(block, i + 1u, 0u, d, -127.0, 127.0),
                word(block, i + 2u, 0u, d, -127.0, 127.0), word(block, i + 3u, 0u, d, -127.0, 127.0),
            );
        }
        return scale;
    }
    let flip = ~outermost & 0x80000000u;  // the outermost weight is number -8, so its sign is not that of d
    quants[out] = vec4(
        nibbles(block, 0u, flip, d), nibbles(block, 1u, flip, d), nibbles(block, 2u, flip, d), nibbles(block, 3u, flip, d),
    );
    return scale | select(0u, flip >> 16u, scale > 0u);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let block = ((group.y * groups.x + group.x) * 64u + thread) * 2u;
    if block >= run.count { return; }
    var scale = quantize(block);
    if block + 1u < run.count { scale |= quantize(block + 1u) << 16u; }
    scales[(run.first + block) / 2u] = scale;
}
