// This file is included by the kernels of AltUp. It is not a kernel.
// The including file includes reduce.wgsl before it, sets K and EPS, and declares
//     router: array<vec4<f32>>   f32 [5, K]: the weight of the router's norm, and the four rows of its matrix

// tanh(M (weight * v / rms(v)) / K), given a thread's part of mean(v^2) K and of the four rows' products with weight * v.
fn routed(thread: u32, squares: f32, products: vec4<f32>) -> vec4<f32> {
    let scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS) / f32(K);
    return tanh(clamp(workgroup_sums(thread, products) * scale, vec4(-20.0), vec4(20.0)));
}

// The products of the four rows with weight * v, at vector `i` of v.
fn router_products(v: vec4<f32>, i: u32) -> vec4<f32> {
    let size = K / 4u;
    let weighted = v * router[i];
    return vec4(
        dot(weighted, router[size + i]), dot(weighted, router[2u * size + i]),
        dot(weighted, router[3u * size + i]), dot(weighted, router[4u * size + i]));
}
