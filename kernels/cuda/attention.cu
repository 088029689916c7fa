// Causal attention over paged keys and values, for rows of any sequences.
//
// The keys of a row are taken in partitions of 128. Each partition by itself gives a largest score, a sum of weights
// and a weighted sum of values; partitions are merged in order (the online softmax of Milakov and Gimelshein 2018). A
// block either goes through all partitions of its row, or computes one of them (flash-decoding, Dao et al. 2023) and
// leaves the merging to `attention_combine`; both do the same operations in the same order, so a row's bits depend on
// that row alone: not on the batch, on chunks, on pages, or on how the host cut the work.

#include "pages.cuh"

namespace attention {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
/// Keys of a partition: one a thread. src/cuda/plan.rs cuts by the same number.
constexpr int PARTITION = THREADS;
/// Query heads a block computes at most; they share the loads of a key/value head.
constexpr int HEADS_MAX = 4;

/// What partitions leave for `attention_combine`: for each slot and query head, the weighted sum of values
/// `[head_dim]`, the largest score, and the sum of weights.
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
    __device__ __forceinline__ float values(float old, float next) const {
        return fmaf(old, old_scale, next * new_scale);
    }
};

/// HEADS query heads of one row over one partition or all.
template <class T, int HEADS>
__device__ __forceinline__ void attention(const float* qkv, Rows rows, const int* items, Pages<T> pages, int heads,
                                          float scale, Partials partials, float* out) {
    static_assert(HEADS <= WARPS, "a warp a head");
    __shared__ float queries[HEADS][HEAD_DIM_MAX];
    // Of one partition: scores, then weights; their maximum and sum; values, summed by groups of threads.
    __shared__ float weights[HEADS][PARTITION];
    __shared__ float next_highest[HEADS], next_sum[HEADS];
    __shared__ float group_values[HEADS][THREADS * 8];
    // Of all partitions so far.
    __shared__ float values[HEADS][HEAD_DIM_MAX];
    float highest[HEADS] = {}, sum[HEADS] = {};

    const int thread = threadIdx.x;
    const int row = items[4 * blockIdx.x], only = items[4 * blockIdx.x + 1], slot = items[4 * blockIdx.x + 2];
    if (row < 0) return;
    const int kv_heads = pages.kv_heads, head_dim = pages.head_dim, shared_by = heads / kv_heads;
    const int chunks = (shared_by + HEADS - 1) / HEADS;
    const int kv_head = blockIdx.y / chunks, first_of_chunk = blockIdx.y % chunks * HEADS;
    const int first = kv_head * shared_by + first_of_chunk, count = min(HEADS, shared_by - first_of_chunk);
    const int keys = rows.positions[row] + 1;
    const int* table = rows.block_tables + rows.table_starts[row];

    const float* q = qkv + static_cast<size_t>(row) * padded((heads + 2 * kv_heads) * head_dim) + first * head_dim;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        for (int i = thread; i < head_dim; i += THREADS) queries[h][i] = h < count ? q[h * head_dim + i] : 0.0f;
    }
    __syncthreads();

    // For the values, eight elements a thread, and as many keys side by side as there are threads for.
    const int lanes = head_dim / 8, groups = THREADS / lanes;
    const int group = thread / lanes, element = thread % lanes * 8;
    const int begin = only < 0 ? 0 : only, end = only < 0 ? (keys + PARTITION - 1) / PARTITION : only + 1;
    for (int partition = begin; partition < end; partition++) {
        const int start = partition * PARTITION, here = min(PARTITION, keys - start);
        float score[HEADS] = {};
        if (thread < here) {
            const T* key = pages.key(table, start + thread, kv_head);
            for (int at = 0; at < head_dim; at += 8) {
                float k[8];
                load8(key + at, k);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
#pragma unroll
                    for (int i = 0; i < 8; i++) score[h] = fmaf(queries[h][at + i], k[i], score[h]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) weights[h][thread] = thread < here ? score[h] * scale : -INFINITY;
        __syncthreads();

        if (warp_id() < HEADS) {
            float* mine = weights[warp_id()];
            float most = mine[lane_id()];
#pragma unroll
            for (int i = 1; i < PARTITION / WARP; i++) most = fmaxf(most, mine[lane_id() + i * WARP]);
            most = warp_max(most);
            float all = 0.0f;
#pragma unroll
            for (int i = 0; i < PARTITION / WARP; i++) {
                const float weight = expf(mine[lane_id() + i * WARP] - most);
                mine[lane_id() + i * WARP] = weight;
                all += weight;
            }
            all = warp_sum(all);
            if (lane_id() == 0) next_highest[warp_id()] = most, next_sum[warp_id()] = all;
        }
        __syncthreads();

        if (group < groups) {
            float mine[HEADS][8] = {};
            for (int i = group; i < here; i += groups) {
                float v[8];
                load8(pages.value(table, start + i, kv_head) + element, v);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
#pragma unroll
                    for (int e = 0; e < 8; e++) mine[h][e] = fmaf(weights[h][i], v[e], mine[h][e]);
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
#pragma unroll
                for (int e = 0; e < 8; e++) group_values[h][group * head_dim + element + e] = mine[h][e];
            }
        }
        __syncthreads();

#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const bool is_first = partition == begin;
            const Merge merge(is_first ? next_highest[h] : highest[h], sum[h], next_highest[h], next_sum[h]);
            for (int i = thread; i < head_dim; i += THREADS) {
                float next = 0.0f;
                for (int g = 0; g < groups; g++) next += group_values[h][g * head_dim + i];
                values[h][i] = is_first ? next : merge.values(values[h][i], next);
            }
            highest[h] = is_first ? next_highest[h] : merge.highest;
            sum[h] = is_first ? next_sum[h] : merge.sum;
        }
    }

    // Each thread goes on with the elements it has merged itself.
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        if (h >= count) continue;
        float* result = out + static_cast<size_t>(row) * padded(heads * head_dim) + (first + h) * head_dim;
        float* partial = slot < 0 ? nullptr : partials.at(slot, first + h);
        for (int i = thread; i < head_dim; i += THREADS) {
            if (partial) {
                partial[i] = values[h][i];
            } else {
                result[i] = values[h][i] / sum[h];
            }
        }
        if (partial && thread == 0) partial[head_dim] = highest[h], partial[head_dim + 1] = sum[h];
    }
}

}  // namespace attention

// attention_{heads a block}_{type of the cache}: out[t, h] = softmax(scale * q[t, h] . K) V over the keys up to the
// row's position. items: [items, 4] with a row, one of its partitions (-1: all of them), and the slot that partition's
// result goes to (-1: none, write the output); row -1 is no work.
// qkv: [rows, (heads + 2 kv_heads) * head_dim]; out: [rows, heads * head_dim].
// Grid: (items, kv_heads * ceil(heads / kv_heads / heads a block)). Bytes: keys and values of each row's context, once
// for the query heads a block computes. Operations: 4 a key, query head and element, in single precision.
// Floor at decoding: the context's keys and values over the bandwidth.
#define ATTENTION(HEADS, SUFFIX, T)                                                                                    \
    extern "C" __global__ void __launch_bounds__(attention::THREADS, 4) attention_##HEADS##_##SUFFIX(                  \
        const float* qkv, const int* positions, const int* table_starts, const int* block_tables, const int* items,    \
        void* pages, int heads, int kv_heads, int head_dim, int block_size, float scale, float* partials,              \
        float* out) {                                                                                                  \
        attention::attention<T, HEADS>(qkv, Rows{positions, table_starts, block_tables}, items,                        \
                                       Pages<T>{static_cast<T*>(pages), kv_heads, head_dim, block_size}, heads, scale, \
                                       attention::Partials{partials, heads, head_dim}, out);                           \
    }                                                                                                                  \
    REGISTER(attention_##HEADS##_##SUFFIX)

ATTENTION(1, f32, float);
ATTENTION(2, f32, float);
ATTENTION(4, f32, float);
ATTENTION(1, f16, Half);
ATTENTION(2, f16, Half);
ATTENTION(4, f16, Half);
ATTENTION(1, bf16, Brain);
ATTENTION(2, bf16, Brain);
ATTENTION(4, bf16, Brain);

// Merges the partitions of rows whose work was split: those with a first slot (-1: none).
// Grid: (rows, heads). Bytes: 4 (head_dim + 2) a partition and head. Operations: two exponentials a partition.
extern "C" __global__ void __launch_bounds__(attention::THREADS)
    attention_combine(const int* positions, const int* first_slots, int heads, int head_dim, float* partials,
                      float* out) {
    const int row = blockIdx.x, head = blockIdx.y, slot = first_slots[row];
    if (slot < 0) return;
    const attention::Partials all{partials, heads, head_dim};
    const int partitions = positions[row] / attention::PARTITION + 1;
    for (int i = threadIdx.x; i < head_dim; i += attention::THREADS) {
        const float* partial = all.at(slot, head);
        float values = partial[i], highest = partial[head_dim], sum = partial[head_dim + 1];
        for (int partition = 1; partition < partitions; partition++) {
            partial = all.at(slot + partition, head);
            const attention::Merge merge(highest, sum, partial[head_dim], partial[head_dim + 1]);
            values = merge.values(values, partial[i]);
            highest = merge.highest, sum = merge.sum;
        }
        out[static_cast<size_t>(row) * padded(heads * head_dim) + head * head_dim + i] = values / sum;
    }
}
REGISTER(attention_combine);
