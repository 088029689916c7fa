// Draws or scores a token from a row of logits, without sorting the vocabulary.
//
// Whatever top_k, top_p and min_p take away, what remains is a leading part of the tokens ordered by likelihood, so
// each filter only has to find where that part ends: a key to cut at, found digit by digit from histograms. Weights are
// counted in whole units of 2^-44 of the likeliest token's: sums of integers do not depend on their order, so the
// result is the same in every run and for any number of threads.

#include "common.cuh"

typedef unsigned long long u64;

namespace sample {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int TOP_MAX = 20;
constexpr float UNITS = 17592186044416.0f; // 2^44: vocabularies of up to 2^19 tokens add up to less than 2^64.

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
/// A token in the order of likelihood: the higher logit is the greater, and on ties the lower id.
__device__ __forceinline__ u64 key(float logit, int id) {
    return static_cast<u64>(ordered(logit)) << 32 | ~static_cast<unsigned>(id);
}
__device__ __forceinline__ float logit_of(u64 key) {
    const unsigned bits = static_cast<unsigned>(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & ~(1u << 31) : ~bits);
}
__device__ __forceinline__ int id_of(u64 key) { return static_cast<int>(~static_cast<unsigned>(key)); }

/// Tokens are counted if they are at or above a cut.
struct Count {
    const float* logits;
    u64 cut;
    __device__ __forceinline__ u64 operator()(int id) const { return key(logits[id], id) >= cut; }
};

/// Tokens weigh e^((logit - max) / temperature), in units, if they are at or above the cuts.
struct Mass {
    const float* logits;
    float max, inverse_temperature;
    u64 cut;
    double lowest;
    __device__ __forceinline__ u64 operator()(int id) const {
        const float logit = logits[id];
        if (key(logit, id) < cut || static_cast<double>(logit) - static_cast<double>(max) < lowest) return 0;
        return __float2ull_rz(expf((logit - max) * inverse_temperature) * UNITS);
    }
};

/// A measure of the tokens with one logit.
template <class Measure>
struct Tied {
    Measure measure;
    unsigned logit;
    __device__ __forceinline__ u64 operator()(int id) const {
        return ordered(measure.logits[id]) == logit ? measure(id) : 0;
    }
};

template <class Measure>
__device__ u64 total(Measure measure, int vocab) {
    u64 sum = 0;
    for (int id = threadIdx.x; id < vocab; id += THREADS) sum += measure(id);
    return block_sum<WARPS>(sum);
}

/// The first token, in the order of ids, at which the sum of the measure exceeds `target`. Each round, the warps
/// measure an eighth of what is left, and all go on with the one that holds the token.
template <class Measure>
__device__ int find_in_order(Measure measure, int vocab, u64 target) {
    __shared__ u64 sums[WARPS];
    int begin = 0, end = vocab;
    while (end - begin > WARP) {
        const int part = ((end - begin + WARPS - 1) / WARPS + WARP - 1) / WARP * WARP;
        const int first = min(begin + warp_id() * part, end), last = min(first + part, end);
        u64 sum = 0;
        for (int id = first + lane_id(); id < last; id += WARP) sum += measure(id);
        sum = warp_sum(sum);
        __syncthreads();
        if (lane_id() == 0) sums[warp_id()] = sum;
        __syncthreads();
        int holder = 0;
        while (holder < WARPS - 1 && sums[holder] <= target) target -= sums[holder++];
        begin = min(begin + holder * part, end - 1);
        end = min(begin + part, end);
    }
    const int id = begin + lane_id();
    u64 sum = id < end ? measure(id) : 0;
#pragma unroll
    for (int delta = 1; delta < WARP; delta *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, sum, delta);
        if (lane_id() >= delta) sum += before;
    }
    const int lane = __ffs(__ballot_sync(ALL_LANES, sum > target)) - 1;
    return lane < 0 ? end - 1 : begin + lane;
}

/// The key of the token that completes `wanted` (at least 1, at most the total) when the measure is added up from the
/// likeliest token down: eight bits of the logit at a time, then the id among those with the same logit.
template <class Measure>
__device__ u64 find_from_top(Measure measure, int vocab, u64 wanted) {
    // Sums in halves, because shared memory adds 32 bits by itself and 64 in a loop of attempts, which the few bins that
    // logits fall into at first would make a long one.
    __shared__ unsigned lows[256], highs[256];
    __shared__ u64 left;
    __shared__ unsigned digit;
    unsigned prefix = 0, mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < 256; bin += THREADS) lows[bin] = highs[bin] = 0;
        __syncthreads();
        for (int id = threadIdx.x; id < vocab; id += THREADS) {
            const unsigned bits = ordered(measure.logits[id]);
            if ((bits & mask) != prefix) continue;
            const u64 amount = measure(id);
            if (amount == 0) continue;
            const unsigned bin = bits >> shift & 255, low = static_cast<unsigned>(amount);
            const unsigned before = atomicAdd(&lows[bin], low);
            const unsigned high = static_cast<unsigned>(amount >> 32) + (before + low < before);
            if (high > 0) atomicAdd(&highs[bin], high);
        }
        __syncthreads();
        const auto in_bin = [&](int bin) { return static_cast<u64>(highs[bin]) << 32 | lows[bin]; };
        if (warp_id() == 0) {
            // A lane has eight bins, the first lane the highest.
            const int highest = 255 - 8 * lane_id();
            u64 mine = 0;
            for (int i = 0; i < 8; i++) mine += in_bin(highest - i);
            u64 sum = mine;
#pragma unroll
            for (int delta = 1; delta < WARP; delta *= 2) {
                const u64 before = __shfl_up_sync(ALL_LANES, sum, delta);
                if (lane_id() >= delta) sum += before;
            }
            const int holder = __ffs(__ballot_sync(ALL_LANES, sum >= wanted)) - 1;
            if (lane_id() == holder) {
                u64 rest = wanted - (sum - mine);
                int bin = highest;
                while (in_bin(bin) < rest) rest -= in_bin(bin--);
                digit = static_cast<unsigned>(bin), left = rest;
            }
        }
        __syncthreads();
        prefix |= digit << shift, mask |= 255u << shift, wanted = left;
        __syncthreads();
    }
    const int id = find_in_order(Tied<Measure>{measure, prefix}, vocab, wanted - 1);
    return static_cast<u64>(prefix) << 32 | ~static_cast<unsigned>(id);
}

/// The key of the likeliest token.
__device__ u64 peak(const float* logits, int vocab) {
    u64 best = 0;
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        const u64 mine = key(logits[id], id);
        best = mine > best ? mine : best;
    }
    return block_max<WARPS>(best);
}

/// Bias, suppression and penalties, in single precision and in this order, as on every backend.
__device__ __forceinline__ void adjust(float* logits, const Row& row, Touched& token, int marks) {
    float logit = logits[token.id];
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

/// Draws from logits of which `best` is the likeliest, and finite.
__device__ int draw(const float* logits, int vocab, const Row& row, u64 best) {
    Mass mass{logits, logit_of(best), row.inverse_temperature, 0, -INFINITY};
    if (row.top_k > 0 && row.top_k < vocab) mass.cut = find_from_top(Count{logits, 0}, vocab, row.top_k);
    if (row.top_p < 1.0f) {
        const u64 all = total(mass, vocab);
        const u64 wanted = static_cast<u64>(ceil(static_cast<double>(row.top_p) * static_cast<double>(all)));
        mass.cut = find_from_top(mass, vocab, wanted < 1 ? 1 : wanted > all ? all : wanted);
    }
    mass.lowest = row.lowest;
    const u64 all = total(mass, vocab);
    const u64 target = static_cast<u64>(row.uniform * static_cast<double>(all));
    return find_in_order(mass, vocab, target < all ? target : all - 1);
}

__device__ void run(float* logits, int vocab, const Row& row, Touched* touched, const int* latest, int& drawn,
                    Outcome& out) {
    __shared__ u64 top[TOP_MAX];
    __shared__ int found;
    __shared__ float before;
    follow();
    for (int id = threadIdx.x; id < vocab; id += THREADS) {
        const float logit = logits[id], clean = finite_or_impossible(logit);
        if (clean != logit) logits[id] = clean;
    }
    __syncthreads();
    u64 best = peak(logits, vocab);
    const float max = logit_of(best);
    bool impossible = max == -INFINITY;
    double log_sum = 0.0;
    if (row.alternatives >= 0 && !impossible) {
        const u64 all = total(Mass{logits, max, 1.0f, 0, -INFINITY}, vocab);
        log_sum = log(static_cast<double>(all) / static_cast<double>(UNITS));
    }
    const auto logprob = [&](float logit) {
        if (logit == -INFINITY) return -INFINITY;
        return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_sum);
    };
    const int top_len = impossible ? 0 : min(min(row.alternatives, vocab), TOP_MAX);
    if (top_len > 0) {
        if (threadIdx.x == 0) found = 0;
        const u64 cut = find_from_top(Count{logits, 0}, vocab, top_len);
        for (int id = threadIdx.x; id < vocab; id += THREADS) {
            const u64 mine = key(logits[id], id);
            if (mine >= cut) top[atomicAdd(&found, 1)] = mine;
        }
        __syncthreads();
        // They were found in any order: each goes where as many are likelier.
        if (threadIdx.x < static_cast<unsigned>(top_len)) {
            const u64 mine = top[threadIdx.x];
            int rank = 0;
            for (int i = 0; i < top_len; i++) rank += top[i] > mine;
            out.ids[rank] = id_of(mine);
            out.logprobs[rank] = logprob(logit_of(mine));
        }
    }

    int token = row.known;
    if (token < 0 && !impossible) {
        if (row.touched < row.touched_end) {
            __syncthreads();
            adjust_all(logits, row, touched, latest);
            __syncthreads();
            best = peak(logits, vocab);
            impossible = logit_of(best) == -INFINITY;
        }
        if (!impossible) token = row.inverse_temperature == 0.0f ? id_of(best) : draw(logits, vocab, row, best);
    }
    if (impossible) token = 0;

    // The model's own logit of the token, which adjusting may have overwritten.
    if (threadIdx.x == 0) before = logits[token];
    __syncthreads();
    if (row.known < 0) {
        for (int i = row.touched + threadIdx.x; i < row.touched_end; i += THREADS) {
            if (touched[i].id == token) before = touched[i].before;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        drawn = token;
        out.token = token;
        out.impossible = impossible;
        out.top_len = impossible ? 0 : top_len > 0 ? top_len : 0;
        out.logprob = row.alternatives >= 0 && !impossible ? logprob(before) : 0.0f;
    }
}

}  // namespace sample

// sample: for each row of logits [rows, vocab], which it overwrites, an outcome, and its token once more in `drawn`:
// what the next step gets as `latest`, while its own rows overwrite `outcomes`. Rows and tokens touched by biases and
// penalties are described by the structures above.
// Grid: rows. Bytes: 4 a logit and pass: 2 passes for greedy rows, 4 for plain draws, 5 more for each of top_k, top_p
// and alternatives; after the first they come from the L2 cache. Operations: an exponential a logit and pass that
// weighs.
extern "C" __global__ void __launch_bounds__(sample::THREADS, 2)
    sample_rows(float* logits, int vocab, const void* rows, void* touched, const int* latest, int* drawn,
                void* outcomes) {
    sample::run(logits + static_cast<size_t>(blockIdx.x) * padded(vocab), vocab,
                static_cast<const sample::Row*>(rows)[blockIdx.x], static_cast<sample::Touched*>(touched), latest,
                drawn[blockIdx.x], static_cast<sample::Outcome*>(outcomes)[blockIdx.x]);
}
REGISTER(sample_rows);
