// This file is included by the kernels whose threads work in teams of LANES (a power of two). It is not a kernel.
// The including file sets WORKGROUP_SIZE and LANES.
var<workgroup> team_scratch: array<vec2<f32>, WORKGROUP_SIZE>;

// The sums of two values over the LANES threads of a team, valid in the first of them.
fn team_sum(thread: u32, values: vec2<f32>) -> vec2<f32> {
    if LANES == 1u { return values; }
    team_scratch[thread] = values;
    workgroupBarrier();
    for (var half_size = LANES / 2u; half_size > 0u; half_size /= 2u) {
        if thread % LANES < half_size {
            team_scratch[thread] += team_scratch[thread + half_size];
        }
        workgroupBarrier();
    }
    let sums = team_scratch[thread];
    workgroupBarrier();
    return sums;
}
