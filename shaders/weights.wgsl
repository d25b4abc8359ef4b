// This file is included by the kernels that read a weight matrix. It is not a kernel.
//
// A matrix W of rows x K lies row-major in blocks of 32 consecutive weights of a row; `block` below is
// row * (K / 32) + column / 32. The including file declares
//     quants: array<vec4<u32>>   the blocks, 4 to 32 words each
//     scales: array<u32>         their scales, by layout
// LAYOUT numbers the layouts as gemma_wgpu/ops/layout.py does, where each is described:
override LAYOUT: u32;
const F32 = 0u;
const F16 = 1u;
const BF16 = 2u;
const INT8 = 3u;         // w = d q            d: f16 a block
const INT8_SUPER = 4u;   // w = (d sc) q       d: f16 per 256 weights, sc: 8-bit per 16            (Q6_K)
const INT4 = 5u;         // w = d (q - 8)      d: f16 a block
const INT4_OFFSET = 6u;  // w = d q + m        d, m: f16 a block                                   (Q4_1)
const INT4_SUPER = 7u;   // w = (d sc) q - e m   d, e: f16 per 256 weights, sc, m: 8-bit per block (Q4_K)

alias Block = array<vec4<f32>, 8>;

fn f16_scale(block: u32) -> f32 {
    return unpack2x16float(scales[block / 2u])[block % 2u];
}

// Two words of halves: four consecutive weights.
fn from_f16(low: u32, high: u32) -> vec4<f32> {
    return vec4(unpack2x16float(low), unpack2x16float(high));
}

fn from_bf16(low: u32, high: u32) -> vec4<f32> {
    let words = vec4(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u);
    return bitcast<vec4<f32>>(words);
}

// The 32 integers of a block, in order, as the signed bytes of 8 words.
fn integers(block: u32) -> array<vec4<u32>, 2> {
    if LAYOUT == INT8 || LAYOUT == INT8_SUPER { return array(quants[block * 2u], quants[block * 2u + 1u]); }
    let nibbles = quants[block];  // 16 bytes hold elements 0 to 15 in their low halves and 16 to 31 in their high ones
    return array(nibbles & vec4(0x0f0f0f0fu), (nibbles >> vec4(4u)) & vec4(0x0f0f0f0fu));
}

// What turns them into weights: (factor of the first 16, factor of the others, what is added).
fn factors(block: u32) -> vec3<f32> {
    switch LAYOUT {
        case INT8: {
            let d = f16_scale(block);
            return vec3(d, d, 0.0);
        }
        case INT8_SUPER: {
            let super_block = block / 8u * 5u;
            let d = unpack2x16float(scales[super_block]).x;
            let index = block % 8u * 2u;  // of the first of this block's two 8-bit scales
            let sc = vec4<f32>(unpack4xI8(scales[super_block + 1u + index / 4u]));
            return vec3(d * sc[index % 4u], d * sc[index % 4u + 1u], 0.0);
        }
        case INT4: {
            let d = f16_scale(block);
            return vec3(d, d, -8.0 * d);
        }
        case INT4_OFFSET: {
            let scale = unpack2x16float(scales[block]);
            return scale.xxy;
        }
        default: {  // INT4_SUPER
            let super_block = block / 8u * 5u;
            let d = unpack2x16float(scales[super_block]);
            let index = block % 8u * 2u;
            let sc = vec4<f32>(unpack4xU8(scales[super_block + 1u + index / 4u]));
            let scale = d.x * sc[index % 4u];
            return vec3(scale, scale, -d.y * sc[index % 4u + 1u]);
        }
    }
}

fn from_int8(word: u32, factor: f32, offset: f32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(word)) * factor + offset;
}

// The 32 weights of a block, in order. No loops: naga guards each against running for ever, which on a CPU adapter costs
// more than what is in them.
fn dequantize(block: u32) -> Block {
    switch LAYOUT {
        case F32: {
            let at = block * 8u;
            return Block(
                bitcast<vec4<f32>>(quants[at]), bitcast<vec4<f32>>(quants[at + 1u]),
                bitcast<vec4<f32>>(quants[at + 2u]), bitcast<vec4<f32>>(quants[at + 3u]),
                bitcast<vec4<f32>>(quants[at + 4u]), bitcast<vec4<f32>>(quants[at + 5u]),
                bitcast<vec4<f32>>(quants[at + 6u]), bitcast<vec4<f32>>(quants[at + 7u]),
            );
        }
        case F16: {
            let a = quants[block * 4u];
            let b = quants[block * 4u + 1u];
            let c = quants[block * 4u + 2u];
            let d = quants[block * 4u + 3u];
            return Block(
                from_f16(a.x, a.y), from_f16(a.z, a.w), from_f16(b.x, b.y), from_f16(b.z, b.w),
                from_f16(c.x, c.y), from_f16(c.z, c.w), from_f16(d.x, d.y), from_f16(d.z, d.w),
            );
        }
        case BF16: {
            let a = quants[block * 4u];
            let b = quants[block * 4u + 1u];
            let c = quants[block * 4u + 2u];
            let d = quants[block * 4u + 3u];
            return Block(
                from_bf16(a.x, a.y), from_bf16(a.z, a.w), from_bf16(b.x, b.y), from_bf16(b.z, b.w),
                from_bf16(c.x, c.y), from_bf16(c.z, c.w), from_bf16(d.x, d.y), from_bf16(d.z, d.w),
            );
        }
        default: {
            let q = integers(block);
            let f = factors(block);
            return Block(
                from_int8(q[0].x, f.x, f.z), from_int8(q[0].y, f.x, f.z),
                from_int8(q[0].z, f.x, f.z), from_int8(q[0].w, f.x, f.z),
                from_int8(q[1].x, f.y, f.z), from_int8(q[1].y, f.y, f.z),
                from_int8(q[1].z, f.y, f.z), from_int8(q[1].w, f.y, f.z),
            );
        }
    }
}

fn add_dot(a: vec4<f32>, b: vec4<f32>, sum: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
}

// The dot products of the first 16 and of the others.
fn half_dots(a: Block, b: Block) -> vec2<f32> {
    return vec2(
        add_dot(a[3], b[3], add_dot(a[2], b[2], add_dot(a[1], b[1], add_dot(a[0], b[0], 0.0)))),
        add_dot(a[7], b[7], add_dot(a[6], b[6], add_dot(a[5], b[5], add_dot(a[4], b[4], 0.0)))),
    );
}

fn block_dot(a: Block, b: Block) -> f32 {
    let halves = half_dots(a, b);
    return halves.x + halves.y;
}

// The dot product of the weights of a block with x. Integers are scaled after their sum.
fn weights_dot(block: u32, x: Block) -> f32 {
    if LAYOUT < INT8 { return block_dot(dequantize(block), x); }
    let q = integers(block);
    let f = factors(block);
    let integer = Block(
        vec4<f32>(unpack4xI8(q[0].x)), vec4<f32>(unpack4xI8(q[0].y)),
        vec4<f32>(unpack4xI8(q[0].z)), vec4<f32>(unpack4xI8(q[0].w)),
        vec4<f32>(unpack4xI8(q[1].x)), vec4<f32>(unpack4xI8(q[1].y)),
        vec4<f32>(unpack4xI8(q[1].z)), vec4<f32>(unpack4xI8(q[1].w)),
    );
    let sum = dot(f.xy, half_dots(integer, x));
    if LAYOUT < INT4 { return sum; }  // nothing is added
    return sum + f.z * dot(x[0] + x[1] + x[2] + x[3] + x[4] + x[5] + x[6] + x[7], vec4(1.0));
}
