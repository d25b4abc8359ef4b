// Included by the kernels that rotate query and key heads. Not a kernel. The including file sets HEAD_DIM and WORKGROUP_SIZE =
// HEAD_DIM / 4: thread t has elements 4t to 4t + 3 of a head.
//
// `rope` holds (cos, sin) of position * frequency for the positions 0 to 255, then for the multiples of 256; a rotation
// by any position is one of each. The table is computed in float64, since f32 angles are off by 1e-3 at position 32768.

// A thread's share of the rotation in halves, (a, b) -> (a cos - b sin, b cos + a sin): its elements become
// own * cos + other * sin, where `other` are those of the thread half a workgroup away.
struct Turn {
    cos: vec4<f32>,
    sin: vec4<f32>,
}

fn turn_to(position: u32, thread: u32) -> Turn {
    var turn: Turn;
    let low = (position % 256u) * (HEAD_DIM / 2u) + (4u * thread) % (HEAD_DIM / 2u);
    let high = (256u + position / 256u) * (HEAD_DIM / 2u) + (4u * thread) % (HEAD_DIM / 2u);
    for (var i = 0u; i < 4u; i++) {
        let a = rope[low + i];
        let b = rope[high + i];
        turn.cos[i] = b.x * a.x - b.y * a.y;
        turn.sin[i] = b.y * a.x + b.x * a.y;
    }
    if thread < WORKGROUP_SIZE / 2u { turn.sin = -turn.sin; }
    return turn;
}

fn partner(thread: u32) -> u32 {
    return (thread + WORKGROUP_SIZE / 2u) % WORKGROUP_SIZE;
}
