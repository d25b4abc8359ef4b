// This file is included by the kernels that sum over a workgroup. It is not a kernel.
// The including file sets WORKGROUP_SIZE, a multiple of 8.
//
// It sums in two steps instead of the usual halvings: eight threads sum up an eighth of the values each, then every thread
// sums up the eight. Three barriers cost less than the halvings' seven, on CPU adapters by far.
var<workgroup> reduce_scratch: array<vec4<f32>, WORKGROUP_SIZE>;
var<workgroup> reduce_eighths: array<vec4<f32>, 8>;

// The sums of four values over the workgroup's threads, the same in each.
fn workgroup_sums(thread: u32, values: vec4<f32>) -> vec4<f32> {
    reduce_scratch[thread] = values;
    workgroupBarrier();
    if thread < 8u {
        var eighth = vec4(0.0);
        for (var i = thread; i < WORKGROUP_SIZE; i += 8u) { eighth += reduce_scratch[i]; }
        reduce_eighths[thread] = eighth;
    }
    workgroupBarrier();
    var sums = vec4(0.0);
    for (var i = 0u; i < 8u; i++) { sums += reduce_eighths[i]; }
    return sums;
}

fn workgroup_sum(thread: u32, value: f32) -> f32 {
    return workgroup_sums(thread, vec4(value, 0.0, 0.0, 0.0)).x;
}

fn workgroup_max(thread: u32, values: vec4<f32>) -> vec4<f32> {
    reduce_scratch[thread] = values;
    workgroupBarrier();
    if thread < 8u {
        var eighth = reduce_scratch[thread];
        for (var i = thread + 8u; i < WORKGROUP_SIZE; i += 8u) { eighth = max(eighth, reduce_scratch[i]); }
        reduce_eighths[thread] = eighth;
    }
    workgroupBarrier();
    var highest = reduce_eighths[0];
    for (var i = 1u; i < 8u; i++) { highest = max(highest, reduce_eighths[i]); }
    return highest;
}
