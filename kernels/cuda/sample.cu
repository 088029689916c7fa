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

#include "sample_cuts.cuh"

namespace sample {

/// Up to so many likeliest tokens are set apart: each will be compared with each.
constexpr int SET_APART_MAX = 256;
/// No logit that is possible is lower.
constexpr float LOWEST = -3.402823466e38f;
constexpr int TOP_MAX = 20;
/// Tokens that a seat holds; src/cuda/seats.rs has the same.
constexpr int SEAT_TOKENS = 16383;

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
    int touched, touched_end; // of the tokens that came with the rows
    int counts_last;   // whether the last of them is to be counted in: it may be among the others too
    int seat;          // where what the sequence has touched stays between steps; -1: nowhere
    int moves_in;      // whether what is there is another's, or no longer holds: all that is to stay came with the row
    int mask;          // which of the masks says what may be drawn; -1: none does
};

/// A token whose logit is changed before the draw, and the logit as it was. With the topmost bit set, which only one
/// that is to be counted in may have, `id` is a row: the token is that which was drawn there in the step before, which
/// the host does not know yet (`Batch::PLACEHOLDER` of src/batch.rs).
struct Touched {
    int id;
    float bias;
    int marks; // how often it was seen in the output, and the bits below
    float before;
};
constexpr int SEEN = 1 << 30, SUPPRESSED = 1 << 29, TIMES = SUPPRESSED - 1;

/// What a sequence has touched, each token once, from one step to the next; src/cuda/seats.rs says who sits where.
struct Seat {
    int listed;
    int unused[3];
    Touched tokens[SEAT_TOKENS];
};
static_assert(sizeof(Seat) == (1 + SEAT_TOKENS) * sizeof(Touched), "src/cuda/sample.rs makes room for as many");

/// The tokens that a row touches.
struct List {
    Touched* tokens;
    int len;
};

struct Outcome {
    int token;
    int impossible;
    float logprob;
    int top_len;
    int ids[TOP_MAX];
    float logprobs[TOP_MAX];
};
static_assert(sizeof(Outcome) == OUTCOME_WORDS * sizeof(int), "kernels that read tokens rely on it");

/// Bias, suppression and penalties, in single precision and in this order, as on every backend.
__device__ __forceinline__ void adjust(float* logits, const Row& row, Touched& token) {
    const int marks = token.marks;
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

/// The tokens that a row touches, which have been counted: what its seat holds, or what came with it.
__device__ __forceinline__ List touched_by(const Row& row, Touched* came, Seat* seats) {
    if (row.seat >= 0) return List{seats[row.seat].tokens, seats[row.seat].listed};
    return List{came + row.touched, row.touched_end - row.touched};
}

/// Counts in the last token that came with a row, where that is wanted, and leaves the list at the row's seat, if it
/// has one, for this step and the next. `latest` are the tokens drawn in the step before.
__device__ void tally(Row& row, Touched* came, Seat* seats, const int* latest) {
    __shared__ bool is_listed;
    follow();
    came += row.touched;
    const int others = row.touched_end - row.touched - row.counts_last;
    int counted = row.counts_last ? came[others].id : -1;
    if (row.counts_last && counted < 0) counted = latest[counted & 0x7fffffff];
    Seat* seat = row.seat < 0 ? nullptr : seats + row.seat;
    const bool moves_in = seat && row.moves_in;
    const List list{seat ? seat->tokens : came, seat && !moves_in ? seat->listed : others};
    if (threadIdx.x == 0) is_listed = false;
    __syncthreads();
    for (int i = threadIdx.x; i < list.len; i += THREADS) {
        Touched& token = list.tokens[i];
        if (moves_in) token = came[i];
        if (token.id == counted) {
            is_listed = true;
            token.marks = (token.marks | SEEN) + 1;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool grows = row.counts_last && !is_listed;
        if (grows) list.tokens[list.len] = Touched{counted, 0.0f, SEEN + 1, 0.0f};
        if (seat) seat->listed = list.len + grows;
        else if (row.counts_last && is_listed) row.touched_end--;
    }
}

/// Adjusts the logits of all that a row touches.
__device__ void adjust_all(float* logits, const Row& row, Touched* came, Seat* seats) {
    const List list = touched_by(row, came, seats);
    for (int i = threadIdx.x; i < list.len; i += THREADS) adjust(logits, row, list.tokens[i]);
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
        Cut cut = may_be_few ? reached_by(are_few ? top_k : SET_APART_MAX, peak.mine) : Cut{INFINITY};
        // A mask may leave fewer than that. What it forbids is not to be drawn, nor to be set apart.
        if (cut.logit == -INFINITY) cut.logit = LOWEST;
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

__device__ void run(float* logits, int vocab, const Row& row, Touched* touched, Seat* seats, const unsigned* masks,
                    int& drawn, Outcome& out) {
    __shared__ Few few;
    // Of the model's own distribution, which is what is reported: kept here, for most rows do not ask.
    __shared__ float max, before;
    __shared__ double log_sum;
    follow();
    const bool reports = row.alternatives >= 0, adjusts = row.seat >= 0 || row.touched < row.touched_end;
    const unsigned* mask = row.mask < 0 ? nullptr : masks + static_cast<size_t>(row.mask) * ((vocab + 31) / 32);
    const int top_len = min(min(row.alternatives, vocab), TOP_MAX);
    const auto logprob = [&](float logit) {
        if (logit == -INFINITY) return -INFINITY;
        return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_sum);
    };
    // Who reports looks once before and once after.
    if (adjusts && !reports) {
        adjust_all(logits, row, touched, seats);
        __syncthreads();
    }
    Peak peak = survey(logits, vocab, reports ? nullptr : mask);
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
    }
    if (reports && (adjusts || mask)) {
        __syncthreads();
        if (adjusts) adjust_all(logits, row, touched, seats);
        __syncthreads();
        peak = survey(logits, vocab, mask);
    }

    const bool impossible = peak.logit == -INFINITY;
    int token = impossible ? 0 : row.known >= 0 ? row.known : peak.id;
    if (!impossible && row.known < 0 && row.inverse_temperature != 0.0f) token = draw(logits, vocab, row, peak, few);

    if (reports) {
        // The model's own logit of the token, which adjusting may have overwritten.
        if (threadIdx.x == 0) before = logits[token];
        __syncthreads();
        if (adjusts) {
            const List list = touched_by(row, touched, seats);
            for (int i = threadIdx.x; i < list.len; i += THREADS) {
                if (list.tokens[i].id == token) before = list.tokens[i].before;
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

// tally: for each row, counts in the token that was drawn last, among those that rows touch, before their logits are
// adjusted. What sequences have touched stays at their seats; no two rows have the same. Grid: rows. Bytes: 16 a token
// that is listed, which come from the L2 cache: some thousands, next to the row's logits.
extern "C" __global__ void __launch_bounds__(sample::THREADS, 1)
    tally_rows(void* rows, void* touched, void* seats, const int* latest) {
    sample::tally(static_cast<sample::Row*>(rows)[blockIdx.x], static_cast<sample::Touched*>(touched),
                  static_cast<sample::Seat*>(seats), latest);
}
REGISTER(tally_rows);

// sample: for each row of logits [rows, vocab], which it overwrites, an outcome, and its token once more in `drawn`:
// what the next step's tally gets as `latest`, while its own rows overwrite `outcomes`. Rows and tokens touched by
// biases and penalties are described by the structures above. A mask has a bit a token, in words of 32.
// Grid: rows. Bytes: 4 a logit and look. A greedy row is looked at once; a plain draw takes two looks, and so do top_k
// up to 256 and top_p with a nucleus of hardly more; a longer one takes 6, a greater top_k 5, both 9, and one more for
// each cut amid equal logits. Reports take one, and one more before penalties or a mask.
// Floors, for 151,936 tokens: a row alone is one multiprocessor's, which takes 64 bytes a clock from the L2 cache:
// 5.5 us a look at 1.73 GHz. A look that weighs does with 16 exponentials and 16 conversions to 64 bits a clock: up to
// 11 us, less where whole warps find nothing that has weight. 256 rows are 155 MB, which no L2 cache holds: each look
// comes from memory, 46 us at 3.35 TB/s.
extern "C" __global__ void __launch_bounds__(sample::THREADS, 1)
    sample_rows(float* logits, int vocab, const void* rows, void* touched, void* seats, const unsigned* masks,
                int* drawn, void* outcomes) {
    sample::run(logits + static_cast<size_t>(blockIdx.x) * padded(vocab), vocab,
                static_cast<const sample::Row*>(rows)[blockIdx.x], static_cast<sample::Touched*>(touched),
                static_cast<sample::Seat*>(seats), masks, drawn[blockIdx.x],
                static_cast<sample::Outcome*>(outcomes)[blockIdx.x]);
}
REGISTER(sample_rows);
