// Included by the kernels whose threads work in teams of LANES (a power of two). Not a kernel.
// The including file sets WORKGROUP_SIZE and LANES.
var<workgroup> team_scratch: array<f32, WORKGROUP_SIZE>;

// The sum of `value` over the LANES threads of a team, valid in the first of them.
fn team_sum(thread: u32, value: f32) -> f32 {
    if LANES == 1u { return value; }
    team_scratch[thread] = value;
    workgroupBarrier();
    for (var half_size = LANES / 2u; half_size > 0u; half_size /= 2u) {
        if thread % LANES < half_size {
            team_scratch[thread] += team_scratch[thread + half_size];
        }
        workgroupBarrier();
    }
    let sum = team_scratch[thread];
    workgroupBarrier();
    return sum;
}
