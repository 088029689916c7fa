// A row of logits as sampling reads it: the order of its tokens, passes over all of them, where a leading part of them
// ends, and what they weigh.
#pragma once

#include "common.cuh"

typedef unsigned long long u64;

namespace sample {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP, "a lane for each warp");
/// Loads of 16 bytes that a thread has under way at a time: 64 KiB a block.
constexpr int LOADS = 4;
constexpr float UNITS = 17592186044416.0f; // 2^44: vocabularies of up to 2^19 tokens add up to less than 2^64.
/// e^-31 is less than a unit.
constexpr float WEIGHTLESS = 31.0f;

__device__ __forceinline__ float finite_or_impossible(float logit) {
    return logit != logit ? -INFINITY : fminf(logit, 3.402823466e38f);
}

/// Bits that order as the logits do; -0 counts as 0.
__device__ __forceinline__ unsigned ordered(float logit) {
    const unsigned bits = __float_as_uint(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float logit_of_ordered(unsigned bits) {
    return __uint_as_float(bits >> 31 ? bits & ~(1u << 31) : ~bits);
}
/// A token in the order of likelihood: the higher logit is the greater, and on ties the lower id.
__device__ __forceinline__ u64 key(float logit, int id) {
    return static_cast<u64>(ordered(logit)) << 32 | ~static_cast<unsigned>(id);
}
__device__ __forceinline__ float logit_of(u64 key) { return logit_of_ordered(static_cast<unsigned>(key >> 32)); }
__device__ __forceinline__ int id_of(u64 key) { return static_cast<int>(~static_cast<unsigned>(key)); }

__device__ __forceinline__ float highest_of(float4 four) {
    return fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
}

/// Beyond the vocabulary follow, instead of what pads a row, impossible tokens: none is less likely.
__device__ __forceinline__ float4 without_padding(float4 four, int id, int vocab) {
    if (id + 4 > vocab) {
        if (id + 1 >= vocab) four.y = -INFINITY;
        if (id + 2 >= vocab) four.z = -INFINITY;
        four.w = -INFINITY;
    }
    return four;
}

/// Calls `each` with four logits and the first one's id, for the ids `from`, `from + step`, ... below `end`, multiples
/// of four.
template <class Each>
__device__ __forceinline__ void sweep(const float* logits, int vocab, int from, int end, int step, Each each) {
    for (; from < end; from += LOADS * step) {
        float4 fours[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int id = from + i * step;
            if (id < end) fours[i] = *reinterpret_cast<const float4*>(logits + id);
        }
        // Asked once for all, since it is the last round's.
        if (from + (LOADS - 1) * step + 4 > vocab) {
#pragma unroll
            for (int i = 0; i < LOADS; i++) fours[i] = without_padding(fours[i], from + i * step, vocab);
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int id = from + i * step;
            if (id >= end) break;
            each(fours[i], id);
        }
    }
}
/// All tokens, over the threads of the block.
template <class Each>
__device__ __forceinline__ void sweep(const float* logits, int vocab, Each each) {
    sweep(logits, vocab, 4 * threadIdx.x, vocab, 4 * THREADS, each);
}

/// Calls `each` with one logit after the other and its id: code that is short and not quick, for what is rare.
template <class Each>
__device__ __forceinline__ void one_by_one(float4 four, int id, Each each) {
#pragma unroll 1
    for (const int end = id + 4; id < end; id++) {
        each(four.x, id);
        four.x = four.y, four.y = four.z, four.z = four.w;
    }
}

/// A number of each warp, shown to all: a lane gets that of the warp of its number.
__device__ __forceinline__ u64 of_warps(u64 warps) {
    __shared__ u64 shown[WARPS];
    __syncthreads();
    if (lane_id() == 0) shown[warp_id()] = warps;
    __syncthreads();
    return shown[lane_id()];
}
__device__ __forceinline__ u64 total(u64 x) { return warp_sum(of_warps(warp_sum(x))); }
__device__ __forceinline__ u64 greatest(u64 x) { return warp_max(of_warps(warp_max(x))); }

/// The sum over the lanes up to this one.
__device__ __forceinline__ u64 running_sum(u64 x) {
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, x, delta);
        if (lane_id() >= delta) x += before;
    }
    return x;
}
__device__ __forceinline__ int first_lane(bool predicate) { return __ffs(__ballot_sync(ALL_LANES, predicate)) - 1; }

/// Where a leading part of the tokens ends: of those with this logit it has the ones up to `id`.
struct Cut {
    float logit = -INFINITY;
    int id = 0x7fffffff;
    __device__ __forceinline__ bool keeps(float other, int other_id) const {
        return other > logit || (other == logit && other_id <= id);
    }
};
__device__ __forceinline__ Cut shorter(const Cut& a, const Cut& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id) ? a : b;
}

/// Measures give each token an amount. What is below their floor has none.

struct Count {
    static constexpr bool IS_COUNT = true;
    static constexpr float floor = -INFINITY;
    Cut cut;
    __device__ __forceinline__ u64 at(float) const { return 1; }
    __device__ __forceinline__ u64 operator()(float, int) const { return 1; }
};

/// Counts the tokens with one logit, those that the cut keeps.
struct Tied {
    float floor;
    Cut cut;
    __device__ __forceinline__ u64 operator()(float logit, int id) const {
        return logit == floor && cut.keeps(logit, id) ? 1 : 0;
    }
};

/// Tokens weigh e^((logit - max) / temperature), in units, if the cut keeps them.
struct Mass {
    static constexpr bool IS_COUNT = false;
    float max, inverse_temperature, floor;
    Cut cut;
    __device__ __forceinline__ Mass(float max, float inverse_temperature)
        : max(max), inverse_temperature(inverse_temperature), floor(max - WEIGHTLESS / inverse_temperature) {}
    /// For whom the weights are not of interest.
    __device__ __forceinline__ Mass of_none() const {
        Mass none = *this;
        none.floor = INFINITY;
        return none;
    }
    __device__ __forceinline__ void shorten(const Cut& to) {
        cut = shorter(cut, to);
        floor = fmaxf(floor, cut.logit);
    }
    __device__ __forceinline__ u64 at(float logit) const {
        return __float2ull_rz(expf((logit - max) * inverse_temperature) * UNITS);
    }
    __device__ __forceinline__ u64 operator()(float logit, int id) const {
        // Not by a branch, so that several exponentials are under way.
        return at(cut.keeps(logit, id) ? logit : -INFINITY);
    }
};

template <class Measure>
__device__ __forceinline__ u64 of_four(const Measure& measure, float4 four, int id) {
    if (highest_of(four) < measure.floor) return 0;
    return measure(four.x, id) + measure(four.y, id + 1) + measure(four.z, id + 2) + measure(four.w, id + 3);
}

}  // namespace sample
