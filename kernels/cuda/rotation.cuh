// How a query or key head is normed and turned to its position: the same bits wherever that is done.
#pragma once

#include "common.cuh"

/// What heads are normed and rotated with.
struct Rotation {
    /// [positions, pairs]. Element i turns together with element i + pairs (the half-split convention).
    const float* cos;
    const float* sin;
    int pairs;
    /// Weights of the norms of queries and keys, [head_dim], if there are any; and what is added to a mean square.
    const float* q_norm;
    const float* k_norm;
    float eps;

    /// A warp takes a head of up to WIDTH elements, `x`, by way of `vector`, of shared memory that is its own;
    /// `put(i, value)` gets each of its elements. With `norm`, the head is normed first.
    template <int WIDTH, class Put>
    __device__ __forceinline__ void turn(const float* x, const float* norm, int position, int head_dim, float* vector,
                                         Put put) const {
        // All loads before anything waits for one.
        constexpr int OWN = WIDTH / WARP;
        float own[OWN], weights[OWN], cosines[OWN], sines[OWN];
        const size_t angles = static_cast<size_t>(position) * pairs;
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const int i = lane_id() + k * WARP;
            own[k] = i < head_dim ? x[i] : 0.0f;
            weights[k] = norm && i < head_dim ? norm[i] : 1.0f;
            cosines[k] = i < 2 * pairs ? cos[angles + (i < pairs ? i : i - pairs)] : 1.0f;
            sines[k] = i < 2 * pairs ? sin[angles + (i < pairs ? i : i - pairs)] : 0.0f;
        }
        if (norm) {
            float squares = 0.0f;
#pragma unroll
            for (int k = 0; k < OWN; k++) squares = fmaf(own[k], own[k], squares);
            const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(head_dim) + eps);
#pragma unroll
            for (int k = 0; k < OWN; k++) own[k] = own[k] * scale * weights[k];
        }
#pragma unroll
        for (int k = 0; k < OWN; k++) vector[lane_id() + k * WARP] = own[k];
        __syncwarp();
#pragma unroll
        for (int k = 0; k < OWN; k++) {
            const int i = lane_id() + k * WARP;
            if (i >= head_dim) continue;
            if (i < 2 * pairs) {
                // Which of the two products is rounded by itself is not left to the compiler.
                const float turned = __fmul_rn(vector[i < pairs ? i + pairs : i - pairs], sines[k]);
                own[k] = fmaf(own[k], cosines[k], i < pairs ? -turned : turned);
            }
            put(i, own[k]);
        }
        // Whoever turns another head by way of the same memory.
        __syncwarp();
    }
};
