// Causal attention over paged keys and values, for rows of any sequences.
//
// The keys of a row are taken in partitions of 128, sixteen of them a warp. The lanes of a warp lie across a head, so
// that what a warp loads at a time is contiguous: two or four tokens of a page. A warp begins as many loads of keys and
// of values as registers hold, before it uses the first; all query heads of a block share them. Each warp gives a
// largest score, a sum of weights and a weighted sum of values for its sixteen keys; eight warps are merged to a
// partition, and partitions in order (the online softmax of Milakov and Gimelshein 2018).
//
// A block goes through all partitions of its row, or through some of them (flash-decoding, Dao et al. 2023). In the
// second case it leaves each one's result in memory, and the block of the row that is the last to do so merges them.
// Both do the same operations in the same order, so a row's bits depend on that row alone: not on the batch, on chunks,
// on pages, or on how the host cut the work.

#include "pages.cuh"
#include "streamed.cuh"

namespace attention {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
/// Keys of a partition a warp takes.
constexpr int SHARE = 16;
/// Keys of a partition. src/cuda/plan.rs cuts by the same number.
constexpr int PARTITION = WARPS * SHARE;

/// What partitions leave for the merge: for each slot and query head, the weighted sum of values `[head_dim]`, the
/// largest score, and the sum of weights.
struct Partials {
    float* base;
    int heads, head_dim;

    __device__ __forceinline__ float* at(int slot, int head) const {
        return base + (static_cast<size_t>(slot) * heads + head) * (head_dim + 2);
    }
};

/// How much the two sides of a merge count, and what comes out of it for largest score and sum.
struct Merge {
    float old_scale, new_scale, highest, sum;

    __device__ __forceinline__ Merge(float old_highest, float old_sum, float new_highest, float new_sum) {
        highest = fmaxf(old_highest, new_highest);
        old_scale = expf(old_highest - highest);
        new_scale = expf(new_highest - highest);
        sum = fmaf(old_sum, old_scale, new_sum * new_scale);
    }
};

/// HEADS query heads of one row over some of its partitions, LANES lanes across a head.
template <class T, int HEADS, int LANES>
__device__ __forceinline__ void attention(const float* qkv, Rows rows, const int* items, Pages<T> pages, int heads,
                                          float scale, Partials partials, int* arrived, float* out) {
    static_assert(HEADS <= WARPS && HEADS <= LANES, "a warp a head when merging, a lane when scores are added up");
    using Eight = Streamed<Floats<T>>;
    using Raw = typename Eight::Raw;
    constexpr int WIDTH = LANES * 8;
    // Keys side by side in a warp, loads for all of them, and loads at a time.
    constexpr int SIDES = WARP / LANES, LOADS = SHARE / SIDES, WORDS = sizeof(Raw) / 4;
    constexpr int ROOM = HEADS == 4 ? 16 : 32;
    constexpr int AT_A_TIME = LOADS <= ROOM / WORDS ? LOADS : ROOM / WORDS;
    // Values of a head and partition that a thread merges.
    constexpr int OWN = (HEADS * WIDTH + THREADS - 1) / THREADS;
    // Read four at a time.
    alignas(16) __shared__ float queries[HEADS][WIDTH];
    // Of each warp: scores, then weights; their maximum and sum; values.
    __shared__ float weights[WARPS][SHARE][HEADS];
    __shared__ float warp_highest[WARPS][HEADS], warp_sums[WARPS][HEADS];
    __shared__ float warp_values[WARPS][HEADS][WIDTH];

    follow();
    const int row = items[4 * blockIdx.x], begin = items[4 * blockIdx.x + 1], end = items[4 * blockIdx.x + 2];
    const int slot = items[4 * blockIdx.x + 3];
    if (row < 0) return;
    const int thread = threadIdx.x, warp = warp_id(), lane = lane_id();
    const int kv_heads = pages.kv_heads, head_dim = pages.head_dim, shared_by = heads / kv_heads;
    const int chunks = (shared_by + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / chunks, first_of_chunk = blockIdx.y % chunks * HEADS;
    const int first = kv_head * shared_by + first_of_chunk, count = min(HEADS, shared_by - first_of_chunk);
    const int keys = rows.positions[row] + 1;
    const int* table = rows.block_tables + rows.table_starts[row];

    const float* q = qkv + static_cast<size_t>(row) * padded((heads + 2 * kv_heads) * head_dim) + first * head_dim;
    for (int i = thread; i < HEADS * WIDTH; i += THREADS) {
        const int h = i / WIDTH, at = i % WIDTH;
        queries[h][at] = h < count && at < head_dim ? q[h * head_dim + at] : 0.0f;
    }

    const int side = lane / LANES, element = lane % LANES * 8;
    float highest[OWN], sum[OWN] = {}, values[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) highest[i] = -INFINITY;
    for (int partition = begin; partition < end; partition++) {
        const int here = min(SHARE, keys - partition * PARTITION - warp * SHARE);
        const int start = partition * PARTITION + warp * SHARE, page = start / pages.block_size;
        // Nothing where there is no key, or no element for this lane.
        auto fetch = [&](int load, bool is_value) {
            const int key = load * SIDES + side;
            Raw raw = {};
            if (key < here && element < head_dim) {
                int which = page, offset = start % pages.block_size + key;
                for (; offset >= pages.block_size; offset -= pages.block_size) which++;
                const size_t head = static_cast<size_t>(table[which]) * kv_heads + kv_head;
                const size_t token = (2 * head + is_value) * pages.block_size + offset;
                raw = Eight::fetch(Floats<T>(pages.base, nullptr), token * head_dim, element);
            }
            return raw;
        };
        Raw key_bits[AT_A_TIME], value_bits[AT_A_TIME];
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++) key_bits[i] = fetch(i, false);
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++) value_bits[i] = fetch(i, true);
        // Queries are there, and nobody reads the last partition's results any more.
        __syncthreads();

        if (here > 0) {
#pragma unroll
            for (int batch = 0; batch < LOADS; batch += AT_A_TIME) {
#pragma unroll
                for (int i = 0; i < AT_A_TIME; i++) {
                    if (batch > 0) key_bits[i] = fetch(batch + i, false);
                }
#pragma unroll
                for (int i = 0; i < AT_A_TIME; i++) {
                    float low[4], high[4], score[HEADS];
                    Eight::unpack(key_bits[i], 0, low), Eight::unpack(key_bits[i], 1, high);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float4 a = *reinterpret_cast<const float4*>(&queries[h][element]);
                        const float4 b = *reinterpret_cast<const float4*>(&queries[h][element + 4]);
                        float s = a.x * low[0];
                        s = fmaf(a.y, low[1], s), s = fmaf(a.z, low[2], s), s = fmaf(a.w, low[3], s);
                        s = fmaf(b.x, high[0], s), s = fmaf(b.y, high[1], s);
                        s = fmaf(b.z, high[2], s), score[h] = fmaf(b.w, high[3], s);
                    }
                    transposed_sum<HEADS, LANES>(score);
                    constexpr int ALIKE = LANES / HEADS;
                    if (lane % ALIKE == 0) {
                        weights[warp][(batch + i) * SIDES + side][lane % LANES / ALIKE] = score[0];
                    }
                }
            }
            __syncwarp();

            // A lane a key, half of the warp a head.
            const int key = lane % SHARE;
#pragma unroll
            for (int pair = 0; pair < HEADS; pair += 2) {
                const int h = min(pair + lane / SHARE, HEADS - 1);
                const float score = key < here ? weights[warp][key][h] * scale : -INFINITY;
                float most = score;
#pragma unroll
                for (int bits = SHARE / 2; bits > 0; bits /= 2) {
                    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, bits));
                }
                const float weight = expf(score - most);
                float all = weight;
#pragma unroll
                for (int bits = SHARE / 2; bits > 0; bits /= 2) all += __shfl_xor_sync(ALL_LANES, all, bits);
                // Both halves have read the only head before one of them writes it.
                if (pair + lane / SHARE < HEADS) {
                    weights[warp][key][h] = weight;
                    if (key == 0) warp_highest[warp][h] = most, warp_sums[warp][h] = all;
                }
            }
            __syncwarp();

            float mine[HEADS][8] = {};
#pragma unroll
            for (int batch = 0; batch < LOADS; batch += AT_A_TIME) {
#pragma unroll
                for (int i = 0; i < AT_A_TIME; i++) {
                    if (batch > 0) value_bits[i] = fetch(batch + i, true);
                }
#pragma unroll
                for (int i = 0; i < AT_A_TIME; i++) {
                    float low[4], high[4];
                    Eight::unpack(value_bits[i], 0, low), Eight::unpack(value_bits[i], 1, high);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float weight = weights[warp][(batch + i) * SIDES + side][h];
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            mine[h][e] = fmaf(weight, low[e], mine[h][e]);
                            mine[h][4 + e] = fmaf(weight, high[e], mine[h][4 + e]);
                        }
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
#pragma unroll
                for (int e = 0; e < 8; e++) {
#pragma unroll
                    for (int bits = WARP / 2; bits >= LANES; bits /= 2) {
                        mine[h][e] += __shfl_xor_sync(ALL_LANES, mine[h][e], bits);
                    }
                    if (side == 0) warp_values[warp][h][element + e] = mine[h][e];
                }
            }
        }
        __syncthreads();

        const int warps = min(WARPS, (keys - partition * PARTITION + SHARE - 1) / SHARE);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
            if (h >= count || at >= head_dim) continue;
            float most = warp_highest[0][h];
            for (int w = 1; w < warps; w++) most = fmaxf(most, warp_highest[w][h]);
            float all = 0.0f, next = 0.0f;
            for (int w = 0; w < warps; w++) {
                const float counts = expf(warp_highest[w][h] - most);
                all = fmaf(warp_sums[w][h], counts, all);
                next = fmaf(warp_values[w][h][at], counts, next);
            }
            if (slot < 0) {
                const Merge merge(highest[i], sum[i], most, all);
                values[i] = fmaf(values[i], merge.old_scale, next * merge.new_scale);
                highest[i] = merge.highest, sum[i] = merge.sum;
            } else {
                float* partial = partials.at(slot + partition - begin, first + h);
                partial[at] = next;
                if (at == 0) partial[head_dim] = most, partial[head_dim + 1] = all;
            }
        }
    }

    if (slot >= 0) {
        // What was left is there for all before it is said to be.
        __threadfence();
        __shared__ int is_last;
        __syncthreads();
        const int all = (keys + PARTITION - 1) / PARTITION, first_slot = slot - begin;
        if (thread == 0) {
            int* count_of_row = arrived + first_slot * gridDim.y + blockIdx.y;
            is_last = atomicAdd(count_of_row, end - begin) + end - begin == all;
            if (is_last) *count_of_row = 0;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();

        // A warp a head finds what partitions count, 32 at a time; then each thread adds up its elements.
        __shared__ float old_scales[HEADS][WARP], new_scales[HEADS][WARP], sums[HEADS][WARP];
        float before = -INFINITY;
        for (int chunk = 0; chunk < all; chunk += WARP) {
            __syncthreads();
            if (warp < count) {
                const float* partial = partials.at(first_slot + min(chunk + lane, all - 1), first + warp);
                const float most = __ldcg(partial + head_dim);
                float so_far = fmaxf(most, before);
#pragma unroll
                for (int delta = 1; delta < WARP; delta *= 2) {
                    so_far = fmaxf(so_far, __shfl_up_sync(ALL_LANES, so_far, delta));
                }
                const float last = __shfl_up_sync(ALL_LANES, so_far, 1);
                old_scales[warp][lane] = expf((lane ? last : before) - so_far);
                new_scales[warp][lane] = expf(most - so_far);
                sums[warp][lane] = __ldcg(partial + head_dim + 1);
                before = __shfl_sync(ALL_LANES, so_far, WARP - 1);
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
                if (h >= count || at >= head_dim) continue;
#pragma unroll 8
                for (int p = 0; p < min(WARP, all - chunk); p++) {
                    const float next = __ldcg(partials.at(first_slot + chunk + p, first + h) + at);
                    sum[i] = fmaf(sum[i], old_scales[h][p], sums[h][p] * new_scales[h][p]);
                    values[i] = fmaf(values[i], old_scales[h][p], next * new_scales[h][p]);
                }
            }
        }
    }

    float* result = out + static_cast<size_t>(row) * padded(heads * head_dim) + first * head_dim;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
        if (h < count && at < head_dim) result[h * head_dim + at] = values[i] / sum[i];
    }
}

/// Blocks of a kernel that a processor is to hold: what that leaves for registers.
template <class T>
constexpr int blocks(int heads, int lanes) {
    return heads == 8 || (lanes == 32 && sizeof(T) == 4) ? 1 : 2;
}

}  // namespace attention

// attention_{heads a block}x{lanes across a head}_{type of the cache}: out[t, h] = softmax(scale * q[t, h] . K) V over
// the keys up to the row's position. items: [items, 4] with a row, the first of its partitions and the one after the
// last, and the slot the first one's result goes to, the others' following (-1: none, these are all of the row's
// partitions); row -1 is no work. arrived: zeros, and zeros again afterwards, one for each slot and block of the
// grid's second side.
// qkv: [rows, (heads + 2 kv_heads) * head_dim]; out: [rows, heads * head_dim].
// Grid: (items, kv_heads * ceil(heads / kv_heads / heads a block)). Bytes: keys and values of each row's context, once
// for the query heads a block computes, and twice 4 (head_dim + 2) for a query head and partition that goes to a slot.
// Operations: 4 a key, query head and element, in single precision. Floor at decoding: the context's keys and values
// over the bandwidth.
#define ATTENTION(HEADS, LANES, SUFFIX, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(attention::THREADS, attention::blocks<T>(HEADS, LANES))               \
        attention_##HEADS##x##LANES##_##SUFFIX(                                                                        \
        const float* qkv, const int* positions, const int* table_starts, const int* block_tables, const int* items,    \
        void* pages, int heads, int kv_heads, int head_dim, int block_size, float scale, float* partials,              \
        int* arrived, float* out) {                                                                                    \
        attention::attention<T, HEADS, LANES>(                                                                         \
            qkv, Rows{positions, table_starts, block_tables}, items,                                                   \
            Pages<T>{static_cast<T*>(pages), kv_heads, head_dim, block_size}, heads, scale,                            \
            attention::Partials{partials, heads, head_dim}, arrived, out);                                             \
    }                                                                                                                  \
    REGISTER(attention_##HEADS##x##LANES##_##SUFFIX);

// Heads of up to 64, 128 and 256 elements.
#define ALL_ATTENTION(SUFFIX, T)  \
    ATTENTION(1, 8, SUFFIX, T)    \
    ATTENTION(2, 8, SUFFIX, T)    \
    ATTENTION(4, 8, SUFFIX, T)    \
    ATTENTION(8, 8, SUFFIX, T)    \
    ATTENTION(1, 16, SUFFIX, T)   \
    ATTENTION(2, 16, SUFFIX, T)   \
    ATTENTION(4, 16, SUFFIX, T)   \
    ATTENTION(8, 16, SUFFIX, T)   \
    ATTENTION(1, 32, SUFFIX, T)   \
    ATTENTION(2, 32, SUFFIX, T)   \
    ATTENTION(4, 32, SUFFIX, T)

ALL_ATTENTION(f32, float)
ALL_ATTENTION(f16, Half)
ALL_ATTENTION(bf16, Brain)
ALL_ATTENTION(f8, Quarter)
