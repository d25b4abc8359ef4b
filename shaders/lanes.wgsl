// This file is included by the kernels in which LANES threads, a power of two, share a pixel or a row. It is not a kernel.
// The including file sets WORKGROUP_SIZE and LANES. With LANES = 1, which suits CPU adapters, there are no barriers.
var<workgroup> lane_scratch: array<f32, WORKGROUP_SIZE>;

// The sum of a value over the threads that share a pixel, the same in each.
fn lane_sum(thread: u32, value: f32) -> f32 {
    if LANES == 1u { return value; }
    lane_scratch[thread] = value;
    workgroupBarrier();
    for (var half_size = LANES / 2u; half_size > 0u; half_size /= 2u) {
        if thread % LANES < half_size { lane_scratch[thread] += lane_scratch[thread + half_size]; }
        workgroupBarrier();
    }
    let sum = lane_scratch[thread / LANES * LANES];
    workgroupBarrier();
    return sum;
}

// The largest of a value over the threads that share a row, the same in each.
fn lane_max(thread: u32, value: f32) -> f32 {
    if LANES == 1u { return value; }
    lane_scratch[thread] = value;
    workgroupBarrier();
    for (var half_size = LANES / 2u; half_size > 0u; half_size /= 2u) {
        if thread % LANES < half_size {
            lane_scratch[thread] = max(lane_scratch[thread], lane_scratch[thread + half_size]);
        }
        workgroupBarrier();
    }
    let highest = lane_scratch[thread / LANES * LANES];
    workgroupBarrier();
    return highest;
}

// The number of the pixel or row that a thread works on, in a grid of x * y workgroups.
fn lane_row(group: vec3<u32>, groups: vec3<u32>, thread: u32) -> u32 {
    return (group.y * groups.x + group.x) * (WORKGROUP_SIZE / LANES) + thread / LANES;
}
