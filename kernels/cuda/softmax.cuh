// The online softmax (Milakov and Gimelshein 2018) of attention on tensor cores, where a lane has a part of two rows of
// a product: of each eight columns two side by side, of the row that its group of four lanes has and of that eight
// below.
#pragma once

#include "common.cuh"

/// 2 to the power of x, but for the last bit or two, and 0 where that is less than 2^-126. Of 0 it is 1, and of minus
/// infinity 0 (PTX ISA, `ex2`).
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#else
    return exp2f(x);
#endif
}

/// Of a lane's two rows: the highest score so far, and this lane's part of the sum of weights.
struct Softmax {
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {};

    /// Scores of keys that are further on than the lane's first row at `position` sees, and the other eight further on,
    /// become minus infinity: their weight is 0, exactly. `score(i)` is element i of the lane's part of COUNT scores.
    template <int COUNT, class Score>
    static __device__ __forceinline__ void mask(Score score, int first_key, int position) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int key = first_key + i / 4 * 8 + lane_id() % 4 * 2 + i % 2;
            if (key > position + i / 2 % 2 * 8) score(i) = -INFINITY;
        }
    }

    /// Makes weights of scores, exp(scale * score) with a `unit` of scale * log2(e), divided by that of the highest
    /// score so far; and says by what all that was summed up before is to be multiplied therefore.
    template <int COUNT, class Score>
    __device__ __forceinline__ void weigh(Score score, float unit, float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = highest[half];
#pragma unroll
            for (int i = half * 2; i < COUNT; i += 4) most = fmaxf(most, fmaxf(score(i), score(i + 1)));
            // Four lanes have a row.
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            // The product is rounded by itself, so that what did not change is multiplied by 1, exactly. By how much it
            // is rounded is in all weights of the row alike, and gone when they are divided by their sum; but the
            // highest score does not weigh 1 exactly.
            const float scaled = __fmul_rn(most, unit);
            rescale[half] = power_of_two(__fmul_rn(highest[half], unit) - scaled);
            highest[half] = most;
            sum[half] *= rescale[half];
#pragma unroll
            for (int i = half * 2; i < COUNT; i += 4) {
                score(i) = power_of_two(fmaf(score(i), unit, -scaled));
                score(i + 1) = power_of_two(fmaf(score(i + 1), unit, -scaled));
                sum[half] += score(i) + score(i + 1);
            }
        }
    }

    /// The sum of all weights of one of the two rows. All lanes meet here.
    __device__ __forceinline__ float total(int half) const {
        float all = sum[half];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        return all + __shfl_xor_sync(ALL_LANES, all, 2);
    }
};
