// This reads a buffer and does next to nothing with it, to measure how fast memory can be read. Decode reads every weight
// once a token and writes little, so its measure is this, and not a copy.
//     out[g, t] = xor over i of words[g, i, t]
//
// words u32 [workgroups, SIZE, 256, 4]      out u32 [workgroups, 256, 4]
// Neighbouring threads read neighbouring vectors of four.
// Grid: x = shares of the buffer.
override SIZE: u32;

@group(0) @binding(0) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var sum = vec4(0u);
    for (var i = 0u; i < SIZE; i++) { sum ^= words[(group.x * SIZE + i) * 256u + thread]; }
    out[group.x * 256u + thread] = sum;
}
