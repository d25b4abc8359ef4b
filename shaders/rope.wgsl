// This file is included by the kernels that rotate query and key heads. It is not a kernel.
// The including file sets HEAD_DIM, and WORKGROUP_SIZE = HEAD_DIM / 4: thread t has elements 4t to 4t + 3 of a head.
//
// `rope` f32 [context, HEAD_DIM / 2] holds (cos, sin) of position * frequency. It is a table since WGSL's own cos and sin
// are good to 2^-11 only, and that near 0.

// A thread's share of the rotation in halves, (a, b) -> (a cos - b sin, b cos + a sin): its elements become
// own * cos + other * sin, where `other` are those of the thread half a workgroup away.
struct Turn {
    cos: vec4<f32>,
    sin: vec4<f32>,
}

fn turn_to(position: u32, thread: u32) -> Turn {
    var turn: Turn;
    let start = position * (HEAD_DIM / 2u) + (4u * thread) % (HEAD_DIM / 2u);
    for (var i = 0u; i < 4u; i++) {
        turn.cos[i] = rope[start + i].x;
        turn.sin[i] = rope[start + i].y;
    }
    if thread < WORKGROUP_SIZE / 2u { turn.sin = -turn.sin; }
    return turn;
}

fn partner(thread: u32) -> u32 {
    return (thread + WORKGROUP_SIZE / 2u) % WORKGROUP_SIZE;
}
