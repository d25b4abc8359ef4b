// This multiplies a block's first matrix at decode by a vector, after the norms before it (Gemma 3 report, section 2):
//     h    = residual + post_weight * previous / rms(previous)      if ADD, else residual; the first times `factor` if SCALED
//     x    = weight * h / rms(h)                                    or h, if not NORMED
//     y[r] = sum_k W[r, k] x[k]                                     or, if GEGLU,
//     y[r] = gelu(sum_k W[r, k] x[k]) * sum_k W[ROWS + r, k] x[k]
// with rms(v) = sqrt(mean(v^2) + eps). Every workgroup computes h. The first one stores it in new_residual, which is another
// buffer, since the others still read the old one.
//
// W: weights.wgsl [ROWS, K], or [2 ROWS, K] if GEGLU      residual, previous, new_residual f32 [K]
// norms f32 [2, K]: post_weight, weight (1 + w of the report); if SCALED, f32 [2 K + 1]: these and then factor, which
// post_weight has in it already
// y f32: rows [FIRST_ROW, FIRST_ROW + ROWS) of it are written
// Workgroup: see matvec.wgsl. If GEGLU, the two rows of a team are a gate and its up. A team has ROUNDS times two rows one
// after the other, so that few workgroups compute h.
override WORKGROUP_SIZE: u32;
override LANES: u32;
override ROUNDS: u32;
override K: u32;
override ROWS: u32;
override FIRST_ROW: u32;
override EPS: f32;
override ADD: bool;
override SCALED: bool;
override NORMED: bool;
override GEGLU: bool;
override VECTORS = K / 4u;
override LAST_ROW = select(ROWS, 2u * ROWS, GEGLU) - 1u;
#include "weights.wgsl"
#include "team.wgsl"
#include "reduce.wgsl"
#include "tanh_gelu.wgsl"

@group(0) @binding(0) var<storage, read> quants: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read> residual: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> previous: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> norms: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> new_residual: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

var<workgroup> x: array<vec4<f32>, VECTORS>;
#include "sharing.wgsl"

fn normalize_x(thread: u32, is_first: bool) {
    var scale = 0.0;
    if ADD {
        var squares = 0.0;
        for (var i = thread; i < VECTORS; i += WORKGROUP_SIZE) {
            squares += dot(previous[i], previous[i]);
        }
        scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
    }
    var squares = 0.0;
    for (var i = thread; i < VECTORS; i += WORKGROUP_SIZE) {
        var h = residual[i];
        if ADD {
            if SCALED { h *= norms[2u * VECTORS].x; }
            h += previous[i] * scale * norms[i];
            if is_first { new_residual[i] = h; }
        }
        x[i] = h;
        squares += dot(h, h);
    }
    if NORMED {
        scale = inverseSqrt(workgroup_sum(thread, squares) / f32(K) + EPS);
        for (var i = thread; i < VECTORS; i += WORKGROUP_SIZE) {
            x[i] *= scale * norms[VECTORS + i];
        }
    }
    workgroupBarrier();
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, place: Place) {
    let thread = place.thread;
    let group_index = group.y * groups.x + group.x;
    normalize_x(thread, group_index == 0u);
    for (var round = 0u; round < ROUNDS; round++) {
        let team = (group_index * ROUNDS + round) * (WORKGROUP_SIZE / LANES) + thread / LANES;
        var rows = vec2(2u * team, 2u * team + 1u);
        if GEGLU { rows = vec2(team, ROWS + team); }
        let first = min(rows.x, LAST_ROW) * (K / 32u);
        let second = min(rows.y, LAST_ROW) * (K / 32u);
        var sums = vec2(0.0);
        for (var block = thread % LANES; block < K / 32u; block += LANES) {
            let x_part = x_block(block, place);
            sums += vec2(weights_dot(first + block, x_part), weights_dot(second + block, x_part));
        }
        sums = team_sum(thread, sums);
        if thread % LANES == 0u {
            if GEGLU {
                if team < ROWS { y[FIRST_ROW + team] = gelu(sums.x) * sums.y; }
            } else {
                if rows.x < ROWS { y[FIRST_ROW + rows.x] = sums.x; }
                if rows.y < ROWS { y[FIRST_ROW + rows.y] = sums.y; }
            }
        }
    }
}
