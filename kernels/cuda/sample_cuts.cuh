// Finding where a leading part of a row's tokens ends, and setting it apart.
#pragma once

#include "sample_order.cuh"

namespace sample {

/// Logits that a warp loads at a time.
constexpr int RUN = 4 * WARP;
/// Tokens that can be set apart. Each has a thread.
constexpr int FEW = THREADS / 2;
constexpr int BINS = 2 * THREADS;

/// The first token, in the order of ids, at which the sum of the measure exceeds a target. That is made of the sum of
/// all, and less than it. Each round, the warps measure a part each of what is left, and all go on with the one that
/// holds the token.
template <class Measure, class Target>
__device__ int find_in_order(const float* logits, int vocab, const Measure& measure, Target target_of) {
    int begin = 0, end = vocab;
    u64 target = 0;
#pragma unroll 1
    for (bool is_first = true; is_first || end - begin > RUN; is_first = false) {
        const int part = ((end - begin + WARPS - 1) / WARPS + RUN - 1) / RUN * RUN;
        const int first = min(begin + warp_id() * part, end), last = min(first + part, end);
        u64 sum = 0;
        sweep(logits, vocab, first + 4 * lane_id(), last, RUN,
              [&](float4 four, int id) { sum += of_four(measure, four, id); });
        sum = of_warps(warp_sum(sum));
        const u64 upto = running_sum(sum);
        if (is_first) target = target_of(__shfl_sync(ALL_LANES, upto, WARP - 1));
        const int holder = first_lane(upto > target);
        target -= __shfl_sync(ALL_LANES, upto - sum, holder);
        begin += holder * part;
        end = min(begin + part, end);
    }
    const int first = begin + 4 * lane_id();
    u64 amounts[4] = {0, 0, 0, 0};
    if (first < end) {
        const float4 four = without_padding(*reinterpret_cast<const float4*>(logits + first), first, vocab);
        amounts[0] = measure(four.x, first), amounts[1] = measure(four.y, first + 1);
        amounts[2] = measure(four.z, first + 2), amounts[3] = measure(four.w, first + 3);
    }
    const u64 sum = amounts[0] + amounts[1] + amounts[2] + amounts[3], upto = running_sum(sum);
    const int holder = first_lane(upto > target);
    target -= upto - sum;
    int place = 0;
#pragma unroll
    for (int i = 0; i < 3; i++) {
        if (place == i && target >= amounts[i]) target -= amounts[i], place++;
    }
    return __shfl_sync(ALL_LANES, first + place, holder);
}

/// The cut after the token that completes `wanted` (at least 1, at most the total) when the measure is added up from
/// the likeliest token down: eleven bits of the logit at a time, then the id among those with the same logit.
template <class Measure>
__device__ Cut find_from_top(const float* logits, int vocab, const Measure& measure, u64 wanted) {
    // Sums in halves, because shared memory adds 32 bits by itself and 64 in a loop of attempts, which the few bins
    // that logits fall into at first would make a long one.
    __shared__ unsigned lows[BINS], highs[BINS];
    __shared__ u64 left, held;
    __shared__ unsigned digit;
    unsigned prefix = 0, mask = 0;
    // The last digit has a bit of the one before once more.
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 10 ? 0 : shift - 11) {
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) lows[bin] = highs[bin] = 0;
        __syncthreads();
        sweep(logits, vocab, [&](float4 four, int first) {
            if (highest_of(four) < measure.floor) return;
            one_by_one(four, first, [&](float logit, int id) {
                const unsigned bits = ordered(logit), bin = bits >> shift & (BINS - 1);
                if ((bits & mask) != prefix) return;
                if (Measure::IS_COUNT) {
                    atomicAdd(&lows[bin], 1u);
                    return;
                }
                const u64 amount = measure(logit, id);
                if (amount == 0) return;
                const unsigned low = static_cast<unsigned>(amount), before = atomicAdd(&lows[bin], low);
                const unsigned high = static_cast<unsigned>(amount >> 32) + (before + low < before);
                if (high > 0) atomicAdd(&highs[bin], high);
            });
        });
        __syncthreads();
        // A thread has two bins, the first thread the highest.
        const int upper_bin = BINS - 1 - 2 * threadIdx.x;
        const auto in_bin = [&](int bin) { return static_cast<u64>(highs[bin]) << 32 | lows[bin]; };
        const u64 upper = in_bin(upper_bin), mine = upper + in_bin(upper_bin - 1);
        const u64 in_warp = running_sum(mine);
        const u64 warps = of_warps(__shfl_sync(ALL_LANES, in_warp, WARP - 1));
        const u64 before = __shfl_sync(ALL_LANES, running_sum(warps) - warps, warp_id()) + in_warp - mine;
        if (before < wanted && wanted <= before + mine) {
            const bool is_upper = wanted - before <= upper;
            digit = is_upper ? upper_bin : upper_bin - 1;
            left = is_upper ? wanted - before : wanted - before - upper;
            held = is_upper ? upper : mine - upper;
        }
        __syncthreads();
        prefix |= digit << shift, mask |= static_cast<unsigned>(BINS - 1) << shift, wanted = left;
    }
    const float logit = logit_of_ordered(prefix);
    // Tokens with one logit have the same amount. Mostly it is just one of them, or all, and their ids need no search.
    const u64 each = measure.at(logit), last = wanted - 1;
    const bool has_all = held - wanted < each;
    __syncthreads();
    if (has_all) return shorter(measure.cut, Cut{logit});
    return {logit, find_in_order(logits, vocab, Tied{logit, measure.cut}, [&](u64) { return last / each; })};
}

/// The likeliest token, and the highest logit that this thread has come by, as it is ordered.
struct Peak {
    float logit;
    int id;
    unsigned mine;
};

/// The first look at a row, which cleans it, and makes impossible what a mask, if there is one, does not allow.
__device__ Peak survey(float* logits, int vocab, const unsigned* mask) {
    float highest = -INFINITY;
    float4 best = {highest, highest, highest, highest};
    int first = 0;
    sweep(logits, vocab, [&](float4 four, int id) {
        if (mask) {
            // Four that one word tells of. What pads a row is impossible here already, and stays zero there.
            const unsigned allowed = mask[id / 32] >> id % 32;
            const auto forbid = [allowed](int place, float& logit, float& stored) {
                if (!(allowed >> place & 1) && logit > -INFINITY) logit = stored = -INFINITY;
            };
            forbid(0, four.x, logits[id]), forbid(1, four.y, logits[id + 1]);
            forbid(2, four.z, logits[id + 2]), forbid(3, four.w, logits[id + 3]);
        }
        if (!(four.x < INFINITY && four.y < INFINITY && four.z < INFINITY && four.w < INFINITY)) {
            const auto clean = [](float& logit, float& stored) {
                const float cleaned = finite_or_impossible(logit);
                if (cleaned != logit) logit = stored = cleaned;
            };
            clean(four.x, logits[id]), clean(four.y, logits[id + 1]);
            clean(four.z, logits[id + 2]), clean(four.w, logits[id + 3]);
        }
        const float mine = highest_of(four);
        if (mine > highest) highest = mine, best = four, first = id;
    });
    const int place = best.x == highest ? 0 : best.y == highest ? 1 : best.z == highest ? 2 : 3;
    const u64 peak = greatest(key(highest, first + place));
    return {logit_of(peak), id_of(peak), ordered(highest)};
}

/// A logit that `wanted` tokens reach, at most as many as there are threads, and hardly more. `mine` is what `survey`
/// has said.
__device__ Cut reached_by(int wanted, unsigned mine) {
    unsigned floor = 0;
    // The last 12 bits would leave out a token or two.
#pragma unroll 1
    for (int bit = 31; bit >= 12; bit--) {
        const unsigned higher = floor | 1u << bit;
        if (__syncthreads_count(mine >= higher) >= wanted) floor = higher;
    }
    return {logit_of_ordered(max(floor, ordered(-INFINITY)))};
}

/// Tokens that were set apart, in any order.
struct Few {
    u64 keys[FEW], weights[FEW];
    int found; // if it is more than FEW, they are not all here
    int drawn;
};

/// Sets apart what a cut keeps; if that is too much, and a number of tokens is `wanted` (not 0), so many. The mass of
/// all tokens.
__device__ u64 set_apart(const float* logits, int vocab, Cut cut, int wanted, const Mass& mass, Few& few) {
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) few.found = 0;
        __syncthreads();
        u64 sum = 0;
        sweep(logits, vocab, [&](float4 four, int first) {
            if (highest_of(four) >= cut.logit) {
                one_by_one(four, first, [&](float logit, int id) {
                    if (!cut.keeps(logit, id)) return;
                    const int place = atomicAdd(&few.found, 1);
                    if (place < FEW) few.keys[place] = key(logit, id);
                });
            }
            sum += of_four(mass, four, first);
        });
        sum = total(sum);
        if (few.found <= FEW || wanted == 0) return sum;
        // Many have the same logit.
        cut = find_from_top(logits, vocab, Count{}, wanted);
    }
}

}  // namespace sample
