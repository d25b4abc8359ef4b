// Included by the kernels that sum over a workgroup. Not a kernel. The including file sets WORKGROUP_SIZE.
var<workgroup> reduce_scratch: array<f32, WORKGROUP_SIZE>;

// The sum of `value` over the workgroup's threads, the same in each. WORKGROUP_SIZE is a power of two.
fn workgroup_sum(thread: u32, value: f32) -> f32 {
    reduce_scratch[thread] = value;
    workgroupBarrier();
    for (var half_size = WORKGROUP_SIZE / 2u; half_size > 0u; half_size /= 2u) {
        if thread < half_size {
            reduce_scratch[thread] += reduce_scratch[thread + half_size];
        }
        workgroupBarrier();
    }
    let sum = reduce_scratch[0];
    workgroupBarrier();
    return sum;
}
