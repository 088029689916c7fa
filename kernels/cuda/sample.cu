// Draws or scores a token from a row of logits, without sorting the vocabulary.
//
// Whatever top_k, top_p and min_p take away, what remains is a leading part of the tokens ordered by likelihood, so
// each filter only has to find where that part ends. Mostly it is short: then its tokens are set apart, and all else is
// done among them. Which they are is known from the first look at the row: the k-th highest of what the threads have
// seen as their highest is reached by k tokens, and by hardly more, since the likeliest are spread over a thousand
// threads. Where that does not do, a cut is found digit by digit from histograms.
//
// Weights are counted in whole units of 2^-44 of the likeliest token's: sums of integers do not depend on their order,
// so the result is the same in every run, for any number of threads, and by either way.

#include "common.cuh"

typedef unsigned long long u64;

namespace sample {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP, "a lane for each warp");
/// Loads of 16 bytes that a thread has under way at a time: 64 KiB a block.
constexpr int LOADS = 4;
/// Logits that a warp loads at a time.
constexpr int RUN = 4 * WARP;
/// Tokens that can be set apart. Each has a thread.
constexpr int FEW = THREADS / 2;
/// Up to so many likeliest tokens are looked for in this way: each will be compared with each.
constexpr int SET_APART_MAX = 256;
constexpr int BINS = 2 * THREADS;
constexpr int TOP_MAX = 20;
constexpr float UNITS = 17592186044416.0f; // 2^44: vocabularies of up to 2^19 tokens add up to less than 2^64.
/// e^-31 is less than a unit.
constexpr float WEIGHTLESS = 31.0f;

/// What to do with a row; src/cuda/sample.rs has the same.
struct Row {
    /// The random number, in [0, 1).
    double uniform;
    /// Tokens whose logit is so much below the highest are cut by min_p; -inf keeps all.
    double lowest;
    float inverse_temperature; // 0: greedy
    float top_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int top_k;         // 0: all
    int known;         // the token to score; -1: draw
    int alternatives;  // -1: not even the token's own log-probability is wanted
    int touched, touched_end;
};

/// A token whose logit is changed before the draw, and the logit as it was. With the topmost bit set, which only the
/// last of a row may have, `id` is a row: the token is that which was drawn there in the step before, which the host
/// does not know yet (`Batch::DRAWN` of src/batch.rs). It may be among the others too.
struct Touched {
    int id;
    float bias;
    int marks; // how often it was seen in the output, and the bits below
    float before;
};
constexpr int SEEN = 1 << 30, SUPPRESSED = 1 << 29, TIMES = SUPPRESSED - 1;

struct Outcome {
    int token;
    int impossible;
    float logprob;
    int top_len;
    int ids[TOP_MAX];
    float logprobs[TOP_MAX];
};
static_assert(sizeof(Outcome) == OUTCOME_WORDS * sizeof(int), "kernels that read tokens rely on it");

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
    // Sums in halves, because shared memory adds 32 bits by itself and 64 in a loop of attempts, which the few bins that
    // logits fall into at first would make a long one.
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

/// The first look at a row, which cleans it.
__device__ Peak survey(float* logits, int vocab) {
    float highest = -INFINITY;
    float4 best = {highest, highest, highest, highest};
    int first = 0;
    sweep(logits, vocab, [&](float4 four, int id) {
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

/// Bias, suppression and penalties, in single precision and in this order, as on every backend.
__device__ __forceinline__ void adjust(float* logits, const Row& row, Touched& token, int marks) {
    float logit = finite_or_impossible(logits[token.id]);
    token.before = logit;
    logit += token.bias;
    if (marks & SUPPRESSED) logit = -INFINITY;
    if (marks & SEEN) {
        logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
        const int times = marks & TIMES;
        if (times > 0) {
            // Not as one operation: that would round once instead of twice.
            logit = __fsub_rn(logit, __fmul_rn(row.frequency_penalty, static_cast<float>(times)));
            logit -= row.presence_penalty;
        }
    }
    logits[token.id] = finite_or_impossible(logit);
}

/// All that a row touches, at least one token. `latest` are the tokens drawn in the step before.
__device__ void adjust_all(float* logits, const Row& row, Touched* touched, const int* latest) {
    __shared__ bool is_listed;
    const int last = row.touched_end - 1;
    const bool is_ahead = touched[last].id < 0;
    const int drawn = is_ahead ? latest[touched[last].id & 0x7fffffff] : -1;
    if (threadIdx.x == 0) is_listed = false;
    __syncthreads();
    for (int i = row.touched + threadIdx.x; i < row.touched_end - is_ahead; i += THREADS) {
        const bool again = touched[i].id == drawn;
        if (again) is_listed = true;
        adjust(logits, row, touched[i], again ? (touched[i].marks | SEEN) + 1 : touched[i].marks);
    }
    __syncthreads();
    if (is_ahead && !is_listed && threadIdx.x == 0) {
        touched[last].id = drawn;
        adjust(logits, row, touched[last], touched[last].marks);
    }
}

/// How much of the mass `all` top_p wants.
__device__ __forceinline__ u64 nucleus(float top_p, u64 all) {
    const u64 wanted = static_cast<u64>(ceil(static_cast<double>(top_p) * static_cast<double>(all)));
    return wanted < 1 ? 1 : wanted > all ? all : wanted;
}

/// Where in the mass `all`, in the order of ids, the token is.
__device__ __forceinline__ u64 target_in(u64 all, double uniform) {
    const u64 target = static_cast<u64>(uniform * static_cast<double>(all));
    return target < all ? target : all - 1;
}

/// The lowest logit that min_p keeps.
__device__ float lowest_kept(float max, double lowest) {
    if (lowest == -INFINITY) return -INFINITY;
    // The highest that is not kept, bit by bit: near 0, one difference may be that of very many logits.
    unsigned cut = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; bit--) {
        const unsigned higher = cut | 1u << bit;
        const double below = static_cast<double>(logit_of_ordered(higher)) - static_cast<double>(max);
        const bool is_kept = higher >= ordered(max) || below >= lowest;
        if (!is_kept) cut = higher;
    }
    return logit_of_ordered(cut + 1);
}

/// Draws from tokens set apart, the likeliest, which are not too many. Without top_k (0), `all` is the mass of all
/// tokens; -1 then, if the likeliest with which top_p is content are more.
__device__ int draw_from_few(Few& few, const Row& row, const Mass& mass, int top_k, u64 all) {
    const int found = few.found;
    const bool is_one = threadIdx.x < static_cast<unsigned>(found);
    const u64 mine = is_one ? few.keys[threadIdx.x] : 0;
    u64 weight = is_one ? mass.at(logit_of(mine)) : 0;
    if (is_one) few.weights[threadIdx.x] = weight;
    __syncthreads();
    int likelier = 0;
    u64 above = 0;
    if (is_one) {
        for (int i = 0; i < found; i++) {
            if (few.keys[i] > mine) likelier++, above += few.weights[i];
        }
    }
    const u64 in_all = top_k > 0 ? (likelier < top_k ? weight : 0) : weight;
    const u64 apart = total(in_all);
    if (top_k > 0) all = apart;
    const u64 wanted = row.top_p < 1.0f ? nucleus(row.top_p, all) : all;
    if (apart < wanted) return -1;
    const bool is_kept = above < wanted && logit_of(mine) >= lowest_kept(mass.max, row.lowest);
    weight = is_kept ? in_all : 0;
    if (is_one) few.weights[threadIdx.x] = weight;
    const u64 target = target_in(total(weight), row.uniform);
    if (weight > 0) {
        u64 before = 0;
        for (int i = 0; i < found; i++) {
            if (id_of(few.keys[i]) < id_of(mine)) before += few.weights[i];
        }
        if (before <= target && target - before < weight) few.drawn = id_of(mine);
    }
    __syncthreads();
    return few.drawn;
}

/// Draws from logits with this peak, which is finite.
__device__ int draw(const float* logits, int vocab, const Row& row, const Peak& peak, Few& few) {
    Mass mass(peak.logit, row.inverse_temperature);
    const int top_k = row.top_k < vocab ? row.top_k : 0;
    const bool are_few = top_k > 0 && top_k <= SET_APART_MAX;
    if (top_k > 0 && !are_few) mass.shorten(find_from_top(logits, vocab, Count{}, top_k));
    if (are_few || row.top_p < 1.0f) {
        // Without top_k, what top_p wants may be among as many. With it, nobody asks what all tokens weigh.
        const bool may_be_few = are_few || top_k == 0;
        const Cut cut = may_be_few ? reached_by(are_few ? top_k : SET_APART_MAX, peak.mine) : Cut{INFINITY};
        const u64 all = set_apart(logits, vocab, cut, are_few ? top_k : 0, are_few ? mass.of_none() : mass, few);
        if (may_be_few && few.found <= FEW) {
            const int token = draw_from_few(few, row, mass, top_k, all);
            if (token >= 0) return token;
        }
        mass.shorten(find_from_top(logits, vocab, mass, nucleus(row.top_p, all)));
    }
    mass.shorten(Cut{lowest_kept(peak.logit, row.lowest)});
    return find_in_order(logits, vocab, mass, [&](u64 all) { return target_in(all, row.uniform); });
}

__device__ void run(float* logits, int vocab, const Row& row, Touched* touched, const int* latest, int& drawn,
                    Outcome& out) {
    __shared__ Few few;
    // Of the model's own distribution, which is what is reported: kept here, for most rows do not ask.
    __shared__ float max, before;
    __shared__ double log_sum;
    follow();
    const bool reports = row.alternatives >= 0, adjusts = row.known < 0 && row.touched < row.touched_end;
    const int top_len = min(min(row.alternatives, vocab), TOP_MAX);
    const auto logprob = [&](float logit) {
        if (logit == -INFINITY) return -INFINITY;
        return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_sum);
    };
    // Who reports looks once before and once after.
    if (adjusts && !reports) {
        adjust_all(logits, row, touched, latest);
        __syncthreads();
    }
    Peak peak = survey(logits, vocab);
    if (reports && peak.logit > -INFINITY) {
        const Cut cut = top_len > 0 ? reached_by(top_len, peak.mine) : Cut{INFINITY};
        const u64 all = set_apart(logits, vocab, cut, top_len, Mass(peak.logit, 1.0f), few);
        if (threadIdx.x == 0) {
            max = peak.logit;
            log_sum = log(static_cast<double>(all) / static_cast<double>(UNITS));
        }
        __syncthreads();
        // Each goes where as many are likelier.
        const int found = few.found;
        if (threadIdx.x < static_cast<unsigned>(found)) {
            const u64 mine = few.keys[threadIdx.x];
            int rank = 0;
            for (int i = 0; i < found; i++) rank += few.keys[i] > mine;
            if (rank < top_len) {
                out.ids[rank] = id_of(mine);
                out.logprobs[rank] = logprob(logit_of(mine));
            }
        }
        if (adjusts) {
            __syncthreads();
            adjust_all(logits, row, touched, latest);
            __syncthreads();
            peak = survey(logits, vocab);
        }
    }

    const bool impossible = peak.logit == -INFINITY;
    int token = impossible ? 0 : row.known >= 0 ? row.known : peak.id;
    if (!impossible && row.known < 0 && row.inverse_temperature != 0.0f) token = draw(logits, vocab, row, peak, few);

    if (reports) {
        // The model's own logit of the token, which adjusting may have overwritten.
        if (threadIdx.x == 0) before = logits[token];
        __syncthreads();
        if (adjusts) {
            for (int i = row.touched + threadIdx.x; i < row.touched_end; i += THREADS) {
                if (touched[i].id == token) before = touched[i].before;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        drawn = token;
        out.token = token;
        out.impossible = impossible;
        out.top_len = impossible || !reports ? 0 : top_len;
        out.logprob = reports && !impossible ? logprob(before) : 0.0f;
    }
}

}  // namespace sample

// sample: for each row of logits [rows, vocab], which it overwrites, an outcome, and its token once more in `drawn`:
// what the next step gets as `latest`, while its own rows overwrite `outcomes`. Rows and tokens touched by biases and
// penalties are described by the structures above.
// Grid: rows. Bytes: 4 a logit and look. A greedy row is looked at once; a plain draw takes two looks, and so do top_k
// up to 256 and top_p with a nucleus of hardly more; a longer one takes 6, a greater top_k 5, both 9, and one more for
// each cut amid equal logits. Reports take one, and one more before penalties.
// Floors, for 151,936 tokens: a row alone is one multiprocessor's, which takes 64 bytes a clock from the L2 cache:
// 5.5 us a look at 1.73 GHz. A look that weighs does with 16 exponentials and 16 conversions to 64 bits a clock: up to
// 11 us, less where whole warps find nothing that has weight. 256 rows are 155 MB, which no L2 cache holds: each look
// comes from memory, 46 us at 3.35 TB/s.
extern "C" __global__ void __launch_bounds__(sample::THREADS, 1)
    sample_rows(float* logits, int vocab, const void* rows, void* touched, const int* latest, int* drawn,
                void* outcomes) {
    sample::run(logits + static_cast<size_t>(blockIdx.x) * padded(vocab), vocab,
                static_cast<const sample::Row*>(rows)[blockIdx.x], static_cast<sample::Touched*>(touched), latest,
                drawn[blockIdx.x], static_cast<sample::Outcome*>(outcomes)[blockIdx.x]);
}
REGISTER(sample_rows);
