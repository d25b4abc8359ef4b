// This is included by the kernels whose blocks do not all begin at words. It is not a kernel. The including file declares
//     raw: array<u32>
fn four(at: u32) -> vec4<u32> {
    return vec4(raw[at], raw[at + 1u], raw[at + 2u], raw[at + 3u]);
}

// Four words that begin in the middle of words: their beginnings are in `low`, and the last one ends in `end`.
fn between(low: vec4<u32>, end: u32) -> vec4<u32> {
    return (low >> vec4(16u)) | (vec4(low.yzw, end) << vec4(16u));
}
