// Included by the kernels that read a weight matrix. Not a kernel.
//
// A matrix W of rows x K lies row-major in blocks of 32 consecutive weights of a row; `block` below is
// row * (K / 32) + column / 32. The including file declares
//     quants: array<vec4<u32>>   the blocks, 4 to 32 words each
//     scales: array<u32>         their scales, by layout
// LAYOUT numbers the layouts as gemma_wgpu/weights/layouts.py does, where each is described:
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

fn from_int8(words: vec4<u32>, index: u32, scale: f32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(words[index])) * scale;
}

// 16 bytes hold elements 0 to 15 in their low nibbles and 16 to 31 in their high ones.
fn from_int4(words: vec4<u32>, scale: f32, offset: f32) -> Block {
    var out: Block;
    for (var i = 0u; i < 4u; i++) {
        out[i] = vec4<f32>(unpack4xU8(words[i] & 0x0f0f0f0fu)) * scale + offset;
        out[i + 4u] = vec4<f32>(unpack4xU8((words[i] >> 4u) & 0x0f0f0f0fu)) * scale + offset;
    }
    return out;
}

// The 32 weights of a block, in order.
fn dequantize(block: u32) -> Block {
    var out: Block;
    switch LAYOUT {
        case F32: {
            for (var i = 0u; i < 8u; i++) { out[i] = bitcast<vec4<f32>>(quants[block * 8u + i]); }
        }
        case F16: {
            for (var i = 0u; i < 4u; i++) {
                let words = quants[block * 4u + i];
                out[2u * i] = from_f16(words.x, words.y);
                out[2u * i + 1u] = from_f16(words.z, words.w);
            }
        }
        case BF16: {
            for (var i = 0u; i < 4u; i++) {
                let words = quants[block * 4u + i];
                out[2u * i] = from_bf16(words.x, words.y);
                out[2u * i + 1u] = from_bf16(words.z, words.w);
            }
        }
        case INT8: {
            let low = quants[block * 2u];
            let high = quants[block * 2u + 1u];
            let d = f16_scale(block);
            for (var i = 0u; i < 4u; i++) {
                out[i] = from_int8(low, i, d);
                out[i + 4u] = from_int8(high, i, d);
            }
        }
        case INT8_SUPER: {
            let low = quants[block * 2u];
            let high = quants[block * 2u + 1u];
            let super_block = block / 8u * 5u;
            let d = unpack2x16float(scales[super_block]).x;
            let index = block % 8u * 2u;  // of the first of this block's two 8-bit scales
            let sc = vec4<f32>(unpack4xI8(scales[super_block + 1u + index / 4u]));
            let first = d * sc[index % 4u];
            let second = d * sc[index % 4u + 1u];
            for (var i = 0u; i < 4u; i++) {
                out[i] = from_int8(low, i, first);
                out[i + 4u] = from_int8(high, i, second);
            }
        }
        case INT4: {
            let d = f16_scale(block);
            out = from_int4(quants[block], d, -8.0 * d);
        }
        case INT4_OFFSET: {
            let scale = unpack2x16float(scales[block]);
            out = from_int4(quants[block], scale.x, scale.y);
        }
        default: {  // INT4_SUPER
            let super_block = block / 8u * 5u;
            let d = unpack2x16float(scales[super_block]);
            let index = block % 8u * 2u;
            let sc = vec4<f32>(unpack4xU8(scales[super_block + 1u + index / 4u]));
            out = from_int4(quants[block], d.x * sc[index % 4u], -d.y * sc[index % 4u + 1u]);
        }
    }
    return out;
}
