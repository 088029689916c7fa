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
//
// Where all rows of a step decode, this also does what rope.cu does otherwise: each block norms and rotates its
// queries, and the one that has the row's last partition its key, which it stores with the value, and reads from shared
// memory. (A row of a prompt reads keys of others in the same step, which have to be there first.)

#include "pages.cuh"
#include "rotation.cuh"
#include "streamed.cuh"

namespace attention {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
/// Keys of a partition a warp takes.
constexpr int SHARE = 16;
/// Keys of a partition. src/cuda/plan.rs cuts by the same number.
constexpr int PARTITION = WARPS * SHARE;

/// Code for devices before compute capability 9.0 takes a few registers more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool IS_OLD = true;
#else
constexpr bool IS_OLD = false;
#endif

/// Eight elements that are zero.
__device__ const uint4 ZEROS[2] = {};

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

/// Sums over the lanes that are a multiple of LANES apart, of eight values: as by `transposed_sum`, each lane ends with
/// a part of them in the first places, and a value is added up in pairs of those furthest apart first.
template <int LANES>
__device__ __forceinline__ void sum_over_sides(float (&values)[8]) {
    int left = 8;
#pragma unroll
    for (int bits = WARP / 2; bits >= LANES; bits /= 2) {
        const bool upper = lane_id() & bits;
        left /= 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < left) {
                const float low = values[i], high = values[left + i];
                values[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, bits);
            }
        }
    }
}

/// HEADS query heads of one row over some of its partitions, LANES lanes across a head.
template <class T, int HEADS, int LANES>
__device__ __forceinline__ void attention(const float* qkv, Rows rows, const int* items, const Rotation& rotation,
                                          Pages<T> pages, int heads, int shared_by, float scale, Partials partials,
                                          int* arrived, float* out, BF16* rounded) {
    static_assert(HEADS <= WARPS && HEADS <= LANES, "a warp a head when merging, a lane when scores are added up");
    using Eight = Streamed<Floats<T>>;
    using Raw = typename Eight::Raw;
    constexpr int WIDTH = LANES * 8;
    // Keys side by side in a warp, loads for all of them, and loads at a time.
    constexpr int SIDES = WARP / LANES, LOADS = SHARE / SIDES, WORDS = sizeof(Raw) / 4;
    constexpr bool IS_TIGHT = (HEADS == 4 && LANES == 16 && (sizeof(T) == 4 || IS_OLD)) ||
                              (HEADS == 1 && LANES == 32 && sizeof(T) == 1);
    constexpr int ROOM = IS_TIGHT ? 16 : 32;
    constexpr int AT_A_TIME = LOADS <= ROOM / WORDS ? LOADS : ROOM / WORDS;
    // Loads whose scores are added up over the lanes together: more at a time would take no fewer exchanges.
    constexpr int GROUP = AT_A_TIME <= 8 / HEADS ? AT_A_TIME : 8 / HEADS, SCORES = GROUP * HEADS;
    // Whether registers for the first values are needed for heads that are turned.
    constexpr bool VALUES_LATE = LANES == 32 || HEADS * LANES == 64;
    // Values of a head and partition that a thread merges.
    constexpr int OWN = (HEADS * WIDTH + THREADS - 1) / THREADS;
    static_assert(LOADS <= LANES && AT_A_TIME % GROUP == 0 && WIDTH % WARP == 0, "see where these are used");
    // A lane's eight are in two halves, so that what lanes read at a time lies side by side.
    alignas(16) __shared__ float queries[HEADS][2][LANES * 4];
    // Of each warp: scores, then weights; their maximum and sum; values. Several are read at a time.
    alignas(16) __shared__ float weights[WARPS][SHARE][HEADS];
    alignas(16) __shared__ float warp_highest[HEADS][WARPS], warp_sums[HEADS][WARPS];
    alignas(16) __shared__ float warp_values[WARPS][HEADS][WIDTH];
    // The row's own key and value, as the cache has them.
    alignas(16) __shared__ T own_key[WIDTH], own_value[WIDTH];

    // Where there is no work: as row 0, but for what follows the plan.
    const int* const item = items + 4 * blockIdx.x;
    const int planned = planned_word(item), row = max(planned, 0);
    const int begin = planned_word(item + 1), end = planned_word(item + 2), slot = planned_word(item + 3);
    // That the warp is that of its first lane, the compiler knows to be the same for all lanes.
    const int thread = threadIdx.x, warp = __shfl_sync(ALL_LANES, warp_id(), 0), lane = lane_id();
    const int kv_heads = pages.kv_heads, head_dim = pages.head_dim;
    const int kv_head = blockIdx.z, first_of_chunk = blockIdx.y * HEADS;
    const int first = kv_head * shared_by + first_of_chunk, count = min(HEADS, shared_by - first_of_chunk);
    const int keys = rows.position(row) + 1;
    const int* table = rows.table(row);

    // Where a lane's elements of the first row of all keys and values lie; those of others are a `stride` a row behind.
    // Single loads have no conditions, as the compiler would copy what they give: lanes that have no elements find
    // zeros, and where there is no key another row is read, of which nothing is used.
    const int side = lane / LANES, element = lane % LANES * 8, block_size = pages.block_size;
    const void* const elements = element < head_dim ? static_cast<const void*>(pages.base + element) : ZEROS;
    const unsigned stride = element < head_dim ? head_dim * static_cast<unsigned>(sizeof(T)) : 0;
    const auto fetch = [&](Raw(&to)[AT_A_TIME], int places, int batch, int here) {
        if (here <= 0) {
            for (Raw& bits : to) Eight::clear(bits);
            return;
        }
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++) {
            const unsigned place = __shfl_sync(ALL_LANES, places, batch + i, LANES);
            const char* from = static_cast<const char*>(elements) + static_cast<size_t>(place) * stride;
            to[i] = Eight::fetch(Floats<T>(reinterpret_cast<const T*>(from), nullptr), 0, 0);
        }
    };
    // Keys of a partition that this warp takes.
    const auto keys_of = [&](int partition) {
        return partition < end ? min(SHARE, keys - partition * PARTITION - warp * SHARE) : 0;
    };
    // A lane knows where one of its side's keys is, whatever the size of pages, and the others ask it. It asks for the
    // page's number early.
    const int key_of_lane = begin * PARTITION + warp * SHARE + lane % LANES % LOADS * SIDES + side;
    const int pages_on = PARTITION / block_size, tokens_on = PARTITION % block_size;
    int page = key_of_lane / block_size, token = key_of_lane % block_size;
    const int last_page = (keys - 1) / block_size;
    // How many rows of `head_dim` elements lie before it (of a layer: less than 2^31). Values of a page come
    // after its keys.
    const auto place = [&](int number) { return (number * kv_heads + kv_head) * 2 * block_size + token; };
    // Loads are under way before anything else is asked for.
    Raw key_bits[AT_A_TIME], value_bits[AT_A_TIME];
    int places = place(planned_word(table + max(min(page, last_page), 0)));
    follow();
    if (planned < 0) return;
    fetch(key_bits, places, 0, keys_of(begin));
    if (!VALUES_LATE) fetch(value_bits, places + block_size, 0, keys_of(begin));

    const float* const projected = qkv + static_cast<size_t>(row) * padded((heads + 2 * kv_heads) * head_dim);
    const auto keep_query = [&](int h, int at, float x) { queries[h][at / 4 % 2][at / 8 * 4 + at % 4] = x; };
    // Whether the row's own key is one of the block's. Nobody else reads it in this step.
    const bool is_fresh = rotation.cos && end * PARTITION >= keys;
    if (rotation.cos) {
        // A warp a head: queries, then key and value.
        for (int job = warp; job < count + (is_fresh ? 2 : 0); job += WARPS) {
            float* const vector = warp_values[warp][0];
            if (job < count) {
                rotation.turn<WIDTH>(projected + (first + job) * head_dim, rotation.q_norm, keys - 1, head_dim, vector,
                                     [&](int i, float x) { keep_query(job, i, x); });
                // What pads a head.
                for (int i = head_dim + lane; i < WIDTH; i += WARP) keep_query(job, i, 0.0f);
                continue;
            }
            // Blocks of the same key and value head have the same; one stores it.
            const bool stores = first_of_chunk == 0;
            if (job == count) {
                T* const key = pages.key(table, keys - 1, kv_head);
                rotation.turn<WIDTH>(projected + (heads + kv_head) * head_dim, rotation.k_norm, keys - 1, head_dim,
                                     vector, [&](int i, float x) {
                                         store(own_key + i, x);
                                         if (stores) key[i] = own_key[i];
                                     });
            } else {
                T* const value = pages.value(table, keys - 1, kv_head);
                const float* const x = projected + (heads + kv_heads + kv_head) * head_dim;
                for (int i = lane; i < head_dim; i += WARP) {
                    store(own_value + i, x[i]);
                    if (stores) value[i] = own_value[i];
                }
            }
        }
        // Heads that are none, of a group of fewer than the kernel is for.
        for (int i = thread; i < (HEADS - count) * WIDTH; i += THREADS) keep_query(count + i / WIDTH, i % WIDTH, 0.0f);
    } else {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
            const float x = h < count && at < head_dim ? projected[(first + h) * head_dim + at] : 0.0f;
            if (h < HEADS) keep_query(h, at, x);
        }
    }
    // The row's own key or value, in place of what was loaded where it lies, which may not have been there yet.
    const auto take_own = [&](Raw(&bits)[AT_A_TIME], const T* own, int batch, int partition) {
        const int key = keys - 1 - partition * PARTITION - warp * SHARE;
        if (!is_fresh || key < 0 || key >= SHARE) return;
        const int load = key % SIDES == side && element < head_dim ? key / SIDES : -1;
#pragma unroll
        for (int i = 0; i < AT_A_TIME; i++) Eight::replace(bits[i], own + element, batch + i == load);
    };

    if (VALUES_LATE) fetch(value_bits, places + block_size, 0, keys_of(begin));

    float highest[OWN], sum[OWN] = {}, values[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) highest[i] = -INFINITY;
    for (int partition = begin; partition < end; partition++) {
        const int here = keys_of(partition), here_next = keys_of(partition + 1);
        page += pages_on, token += tokens_on;
        if (token >= block_size) token -= block_size, page++;
        const int next_page = table[min(page, last_page)];
        // Queries are there, and nobody reads the last partition's results any more.
        __syncthreads();

        if (here > 0) {
            float query[HEADS][8];
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                const float4 low = *reinterpret_cast<const float4*>(&queries[h][0][lane % LANES * 4]);
                const float4 high = *reinterpret_cast<const float4*>(&queries[h][1][lane % LANES * 4]);
                query[h][0] = low.x, query[h][1] = low.y, query[h][2] = low.z, query[h][3] = low.w;
                query[h][4] = high.x, query[h][5] = high.y, query[h][6] = high.z, query[h][7] = high.w;
            }
#pragma unroll
            for (int batch = 0; batch < LOADS; batch += AT_A_TIME) {
                if (batch > 0) fetch(key_bits, places, batch, here);
                take_own(key_bits, own_key, batch, partition);
#pragma unroll
                for (int group = 0; group < AT_A_TIME; group += GROUP) {
                    float scores[SCORES];
#pragma unroll
                    for (int i = 0; i < GROUP; i++) {
                        float low[4], high[4];
                        Eight::unpack(key_bits[group + i], 0, low), Eight::unpack(key_bits[group + i], 1, high);
#pragma unroll
                        for (int h = 0; h < HEADS; h++) {
                            float s = query[h][0] * low[0];
#pragma unroll
                            for (int e = 1; e < 4; e++) s = fmaf(query[h][e], low[e], s);
#pragma unroll
                            for (int e = 0; e < 4; e++) s = fmaf(query[h][4 + e], high[e], s);
                            scores[i * HEADS + h] = s;
                        }
                    }
                    transposed_sum<SCORES, LANES>(scores);
                    constexpr int ALIKE = LANES / SCORES;
                    const int mine = lane % LANES / ALIKE, load = batch + group + mine / HEADS;
                    if (lane % ALIKE == 0) weights[warp][load * SIDES + side][mine % HEADS] = scores[0];
                }
            }
        }
        // The next partition's keys are on their way while this one's values are added up.
        const int next_places = place(next_page);
        fetch(key_bits, next_places, 0, here_next);

        float mine[HEADS][8] = {};
        if (here > 0) {
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
                if (HEADS == 1) __syncwarp();
                if (pair + lane / SHARE < HEADS) {
                    weights[warp][key][h] = weight;
                    if (key == 0) warp_highest[h][warp] = most, warp_sums[h][warp] = all;
                }
            }
            __syncwarp();

#pragma unroll
            for (int batch = 0; batch < LOADS; batch += AT_A_TIME) {
                if (batch > 0) fetch(value_bits, places + block_size, batch, here);
                take_own(value_bits, own_value, batch, partition);
                if (here < SHARE) {
                    // A weight of 0 needs a number to multiply.
#pragma unroll
                    for (int i = 0; i < AT_A_TIME; i++) {
                        if ((batch + i) * SIDES + side >= here) Eight::clear(value_bits[i]);
                    }
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
        }
        places = next_places;
        fetch(value_bits, places + block_size, 0, here_next);
        if (here > 0) {
            // Added up over the sides, each of which ends with its part of the eight.
            constexpr int LEFT = 8 / SIDES;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                sum_over_sides<LANES>(mine[h]);
                float* const to = &warp_values[warp][h][element + side * LEFT];
#pragma unroll
                for (int e = 0; e < LEFT; e++) to[e] = mine[h][e];
            }
        } else {
            // Nothing, and counted as much.
            if (lane < HEADS) warp_highest[lane][warp] = -INFINITY, warp_sums[lane][warp] = 0.0f;
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                for (int at = lane; at < WIDTH; at += WARP) warp_values[warp][h][at] = 0.0f;
            }
        }
        __syncthreads();

        // All of a warp merge the same head.
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
            if (h >= count) continue;
            // A lane a warp.
            const float its_highest = warp_highest[h][lane % WARPS];
            float most = its_highest;
#pragma unroll
            for (int bits = WARPS / 2; bits > 0; bits /= 2) {
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, bits));
            }
            const float its_counts = expf(its_highest - most);
            float all = 0.0f, next = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float counts = __shfl_sync(ALL_LANES, its_counts, w);
                all = fmaf(warp_sums[h][w], counts, all);
                next = fmaf(warp_values[w][h][at], counts, next);
            }
            if (at >= head_dim) continue;
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
        __shared__ int is_last;
        __syncthreads();
        const int all = (keys + PARTITION - 1) / PARTITION, first_slot = slot - begin;
        if (thread == 0) {
            // What the block left is there for all before it is said to be, and what others left before this one reads
            // it: a fence is for all that its thread knows of, by barriers too (it is cumulative), so one thread's do.
            __threadfence();
            int* count_of_row = arrived + first_slot * heads + first;
            is_last = atomicAdd(count_of_row, end - begin) + end - begin == all;
            if (is_last) *count_of_row = 0;
            __threadfence();
        }
        __syncthreads();
        if (!is_last) return;

        // A warp a head finds what partitions count, 32 at a time; then each thread adds up its elements.
        __shared__ float old_scales[HEADS][WARP], new_scales[HEADS][WARP], sums[HEADS][WARP];
        float before = -INFINITY;
        for (int chunk = 0; chunk < all; chunk += WARP) {
            const int here = min(WARP, all - chunk);
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
            // Loads under way together.
            constexpr int TOGETHER = 32 / OWN;
            for (int part = 0; part < here; part += TOGETHER) {
                float next[OWN][TOGETHER];
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
                    const bool is_one = h < count && at < head_dim;
#pragma unroll
                    for (int p = 0; p < TOGETHER; p++) {
                        const float* from = partials.at(first_slot + chunk + part + p, first + h) + at;
                        next[i][p] = is_one && part + p < here ? __ldcg(from) : 0.0f;
                    }
                }
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    const int h = min((thread + i * THREADS) / WIDTH, HEADS - 1);
#pragma unroll
                    for (int p = 0; p < TOGETHER; p++) {
                        if (part + p >= here) break;
                        const float old_scale = old_scales[h][part + p], new_scale = new_scales[h][part + p];
                        sum[i] = fmaf(sum[i], old_scale, sums[h][part + p] * new_scale);
                        values[i] = fmaf(values[i], old_scale, next[i][p] * new_scale);
                    }
                }
            }
        }
    }

    // Heads are a multiple of eight elements wide, and nothing pads a row.
    const size_t start = (static_cast<size_t>(row) * heads + first) * head_dim;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int h = (thread + i * THREADS) / WIDTH, at = (thread + i * THREADS) % WIDTH;
        if (h >= count || at >= head_dim) continue;
        const float result = values[i] / sum[i];
        if (rounded) {
            store(rounded + start + h * head_dim + at, result);
        } else {
            store(out + start + h * head_dim + at, result);
        }
    }
}

/// Blocks of a kernel that a processor is to hold: what that leaves for registers.
template <class T>
constexpr int blocks(int heads, int lanes) {
    return heads == 8 || heads * lanes == 128 || (lanes == 32 && sizeof(T) == 4) ? 1 : 2;
}

}  // namespace attention

// attention_{heads a block}x{lanes across a head}_{type of the cache}: out[t, h] = softmax(scale * q[t, h] . K) V over
// the keys up to the row's position. items: [items, 4] with a row, the first of its partitions and the one after the
// last, and the slot the first one's result goes to, the others' following (-1: none, these are all of the row's
// partitions); row -1 is no work. arrived: zeros, and zeros again afterwards, one for each slot and query head, of
// which a block counts at its first. shared_by: heads / kv_heads. With cos and sin, of [positions, pairs], queries and
// the row's key and value are as projected, and are normed, rotated and stored as by rope_and_cache; no other row of
// the step may be of the same sequence then.
// qkv: [rows, (heads + 2 kv_heads) * head_dim]; out: [rows, heads * head_dim], or instead of it the same as a product
// with bf16 weights takes it, rounded.
// Grid: (items, ceil(shared_by / heads a block), kv_heads), which saves blocks two divisions before their first loads.
// Bytes: keys and values of each row's context, once for the query heads a block computes, and twice 4 (head_dim + 2)
// for a query head and partition that goes to a slot. Operations: 4 a key, query head and element, in single precision.
// Floor at decoding: the context's keys and values over the bandwidth.
#define ATTENTION(HEADS, LANES, SUFFIX, T)                                                                             \
    extern "C" __global__ void __launch_bounds__(attention::THREADS, attention::blocks<T>(HEADS, LANES))               \
        attention_##HEADS##x##LANES##_##SUFFIX(                                                                        \
        const float* qkv, const int* positions, const int* table_starts, const int* block_tables, const int* items,    \
        const float* cos, const float* sin, int pairs, const float* q_norm, const float* k_norm, float eps,            \
        void* pages, int heads, int kv_heads, int shared_by, int head_dim, int block_size, float scale,                \
        float* partials, int* arrived, float* out, BF16* rounded) {                                                    \
        attention::attention<T, HEADS, LANES>(                                                                         \
            qkv, Rows{positions, table_starts, block_tables}, items, Rotation{cos, sin, pairs, q_norm, k_norm, eps},   \
            Pages<T>{static_cast<T*>(pages), kv_heads, head_dim, block_size}, heads, shared_by, scale,                 \
            attention::Partials{partials, heads, head_dim}, arrived, out, rounded);                                    \
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
ALL_ATTENTION(f16, F16)
ALL_ATTENTION(bf16, BF16)
ALL_ATTENTION(f8, F8)
