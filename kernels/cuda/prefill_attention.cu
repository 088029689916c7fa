// Causal attention of prompts over paged keys and values, on tensor cores.
//
// A block takes one query head of up to 128 consecutive tokens of a sequence, a warp 16 of them, and goes through the
// keys in tiles from the sequence's start: of 64 keys, or 16 for heads of 256 elements, which leave registers for no
// more. The online softmax (Milakov and Gimelshein 2018), its rescaling and all fragments stay in registers
// (FlashAttention-2, Dao 2023). Queries and weights are rounded to the cache's type, f16 or bf16, before they are
// multiplied; scores, the softmax and all sums are f32, and the sum of weights is that of unrounded ones. Keys and
// values of eight bits become f16 on their way to shared memory, through registers: then it is f16 that all else is
// rounded to (and a query beyond 65504 is infinite, as with a cache of f16).
//
// A row's bits depend on that row and its sequence's keys and values up to it: tiles of keys are at fixed places, come
// in order, and a masked key contributes exactly nothing (its score is minus infinity, its weight 0; a tile of nothing
// else multiplies by 1 and adds 0). So they depend neither on the batch, nor on pages, nor on which tokens share a
// tile, hence not on how a prompt was cut into chunks. attention.cu adds up in another order and does not round
// queries: a row that is decoded differs from the same row in a prompt.
//
// One exception: a value that is infinite or not a number spoils earlier tokens of its own sequence that are computed
// in the same tile, as zero times it is not a number. (Of values nobody has written yet zeros are read.)

#include "mma.cuh"
#include "pages.cuh"
#include "softmax.cuh"

namespace prefill_attention {

/// With 16 tokens each: src/cuda/plan.rs cuts prompts into as many.
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
/// Tiles of keys or values in shared memory: one in use, one or two on their way.
constexpr int SLOTS = 3;

/// How keys and values of type T get to shared memory, as elements of type Multiplied: a chunk at a time, asked for
/// with `fetch`, there after `settle` and the barrier that the copies of this thread's others are waited for with.
template <class T>
struct Carried {
    using Multiplied = T;

    __device__ __forceinline__ void fetch(Chunk* to, const T* from, bool valid) { copy_async(to, from, valid); }
    __device__ __forceinline__ void settle(Chunk*) const {}
};

template <>
struct Carried<F8> {
    using Multiplied = F16;
    uint2 held;

    __device__ __forceinline__ void fetch(Chunk*, const F8* from, bool valid) {
        held = valid ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
    }
    __device__ __forceinline__ void settle(Chunk* to) const {
        *to = {halves_of(static_cast<uint16_t>(held.x)), halves_of(held.x >> 16),
               halves_of(static_cast<uint16_t>(held.y)), halves_of(held.y >> 16)};
    }
};

template <class Stored, int HEAD_DIM, int KEYS>
__device__ __forceinline__ void attention(const float* qkv, Rows rows, const int* tiles, const Stored* base, int heads,
                                          int kv_heads, int block_size, float scale, float* out) {
    using T = typename Carried<Stored>::Multiplied;
    constexpr int WIDTH = HEAD_DIM / CHUNK, SLOT = KEYS * WIDTH, CHUNKS = SLOT / THREADS;
    static_assert(CHUNKS * THREADS == SLOT && KEYS % 16 == 0 && HEAD_DIM % 16 == 0, "threads share evenly");
    Chunk* const slots = shared_chunks<SLOTS * SLOT>();
    const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
    const int block = static_cast<int>(blockIdx.x), head = block % heads;
    const int* const planned = tiles + block / heads * 2;
    const int first = planned_word(planned), count = planned_word(planned + 1);
    const int position = rows.position(first), last = position + count - 1, steps = last / KEYS + 1;
    // Pages have 2^shift tokens, so that no address takes a division.
    const int* const table = rows.table(first);
    const int shift = __ffs(block_size) - 1, page_elements = 2 * kv_heads * block_size * HEAD_DIM;
    const Stored* const of_head = base + 2 * (head / (heads / kv_heads)) * block_size * HEAD_DIM;

    // Tiles come in turns, keys, then values; each goes where the one three before it was.
    Carried<Stored> carried[CHUNKS];
    const auto place_of = [&](int tile, int i) {
        const int key = (thread + i * THREADS) / WIDTH, chunk = (thread + i * THREADS) % WIDTH;
        return slots + tile % SLOTS * SLOT + swizzled<WIDTH>(key, chunk);
    };
    const auto position_of = [&](int step, int i) { return step * KEYS + (thread + i * THREADS) / WIDTH; };
    // The pages of a step's keys and values, which are asked for one step ahead.
    int numbers[CHUNKS];
    const auto look_up = [&](int step) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            numbers[i] = planned_word(table + (min(position_of(step, i), last) >> shift));
        }
    };
    const auto bring = [&](int tile) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int chunk = (thread + i * THREADS) % WIDTH, at = position_of(tile / 2, i);
            const int in_page = ((at & (block_size - 1)) + tile % 2 * block_size) * HEAD_DIM + chunk * CHUNK;
            const Stored* from = of_head + static_cast<size_t>(numbers[i]) * page_elements + in_page;
            // What lies behind the last token may be anything, but a weight of 0 needs a number to multiply.
            carried[i].fetch(place_of(tile, i), from, at <= last);
        }
    };
    // Comes after the barrier that says that nobody reads the tile before it in its place any more, which `bring` comes
    // after too, and before the one that says that this tile is there.
    const auto settle = [&](int tile) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) carried[i].settle(place_of(tile, i));
    };
    look_up(0);
    follow();
    bring(0);
    commit_copies();
    settle(0);
    bring(1);
    commit_copies();
    settle(1);
    look_up(1);

    // A lane's part of two rows: the one that its group has in a fragment, and that eight below.
    const int warp_row = warp_id() * 16, my_row = warp_row + lane / 4;
    unsigned queries[HEAD_DIM / 16][4];
    {
        const int stride = padded((heads + 2 * kv_heads) * HEAD_DIM);
        const float* q = qkv + static_cast<size_t>(first) * stride + head * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = my_row + j % 2 * 8;
                const float* two = q + static_cast<size_t>(row) * stride + i * 16 + j / 2 * 8;
                queries[i][j] = row < count ? pair<T>(two[0], two[1]) : 0u;
            }
        }
    }
    // exp(scale * x) is 2 to the power of unit * x.
    const float unit = scale * 1.44269504f;
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float values[HEAD_DIM / 8][4] = {};
    const int warp_last = warp_row < count ? position + min(warp_row + 15, count - 1) : -1;
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        // Of a warp without rows, or behind all of them, nothing is asked but to come along.
        const bool works = step * KEYS <= warp_last;
        unsigned weights[KEYS / 16][4];

        wait_for_copies<1>();
        // The keys are there, and nobody reads the values before them any more.
        __syncthreads();
        if (step + 1 < steps) bring(2 * step + 2);
        commit_copies();
        if (works) {
            const Chunk* const keys = slots + 2 * step % SLOTS * SLOT;
            float scores[KEYS / 8][4] = {};
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 16; i++) {
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++) {
                    unsigned k[4];
                    load_matrices(k, lying<WIDTH>(keys, j * 16, i * 2));
                    multiply_add<T>(scores[2 * j], queries[i], k[0], k[1]);
                    multiply_add<T>(scores[2 * j + 1], queries[i], k[2], k[3]);
                }
            }
            if ((step + 1) * KEYS - 1 > position + warp_row) {
#pragma unroll
                for (int i = 0; i < KEYS / 8 * 4; i++) {
                    const int key = step * KEYS + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (key > position + my_row + i % 4 / 2 * 8) scores[i / 4][i % 4] = -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = highest[half];
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) {
                    most = fmaxf(most, fmaxf(scores[i][half * 2], scores[i][half * 2 + 1]));
                }
                // Four lanes have a row.
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                // The product is rounded by itself, so that what did not change is multiplied by 1, exactly. By how
                // much it is rounded is in all weights of the row alike, and gone when they are divided by their sum;
                // but the highest score does not weigh 1 exactly.
                const float scaled = __fmul_rn(most, unit);
                const float rescale = power_of_two(__fmul_rn(highest[half], unit) - scaled);
                highest[half] = most;
                sum[half] *= rescale;
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 8; i++) {
                    values[i][half * 2] *= rescale;
                    values[i][half * 2 + 1] *= rescale;
                }
#pragma unroll
                for (int i = 0; i < KEYS / 8; i++) {
                    const float low = power_of_two(fmaf(scores[i][half * 2], unit, -scaled));
                    const float high = power_of_two(fmaf(scores[i][half * 2 + 1], unit, -scaled));
                    sum[half] += low + high;
                    // What a lane has of c, of two products side by side, is what it has of a.
                    weights[i / 2][i % 2 * 2 + half] = pair<T>(low, high);
                }
            }
        }
        if (step + 1 < steps) settle(2 * step + 2);

        wait_for_copies<1>();
        // The values are there, and nobody reads the keys any more.
        __syncthreads();
        if (step + 1 < steps) bring(2 * step + 3), look_up(step + 2);
        commit_copies();
        if (works) {
            const Chunk* const rows_of_values = slots + (2 * step + 1) % SLOTS * SLOT;
#pragma unroll
            for (int i = 0; i < KEYS / 16; i++) {
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 16; j++) {
                    unsigned v[4];
                    load_transposed(v, upright<WIDTH>(rows_of_values, i * 16, j * 2));
                    multiply_add<T>(values[2 * j], weights[i], v[0], v[1]);
                    multiply_add<T>(values[2 * j + 1], weights[i], v[2], v[3]);
                }
            }
        }
        if (step + 1 < steps) settle(2 * step + 3);
    }

    // All lanes meet here; then each writes what it has of rows that there are.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float all = sum[half];
        all += __shfl_xor_sync(ALL_LANES, all, 1);
        all += __shfl_xor_sync(ALL_LANES, all, 2);
        const int row = my_row + half * 8;
        if (row >= count) continue;
        float* to = out + static_cast<size_t>(first + row) * padded(heads * HEAD_DIM) + head * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++) {
            to[i * 8] = values[i][half * 2] / all;
            to[i * 8 + 1] = values[i][half * 2 + 1] / all;
        }
    }
}

}  // namespace prefill_attention

// prefill_attention_{head_dim}_{type of the cache}: out[t, h] = softmax(scale * q[t, h] . K) V over the keys up to the
// row's position. tiles: [tiles, 2] with a row, and how many rows from it on are tokens of one sequence that follow
// each other, at most 128. Pages are of a power of two of tokens.
// qkv: [rows, (heads + 2 kv_heads) * head_dim]; out: [rows, heads * head_dim].
// Grid: tiles * heads, a tile's heads side by side: those that share keys and values find them in the L2 cache.
// Shared memory: 24 KiB a block for heads of 64 and 256, 36 for 96, 48 for 128; by registers an SM holds one block, or
// two with heads of 64. Operations: 4 head_dim a key, row and head; the half of them that a whole prompt masks is
// skipped, but for the tiles it goes through. Bytes: keys and values of a tile's context, from the L2 cache, 4
// head_dim a key (2 of eight bits) for 128 rows of a head, so 128 operations a byte: at 600 Tflop/s (mma on an H100)
// 4.7 TB/s, about what that cache gives; queries and output, 8 head_dim a row and head. Floor: the operations at that
// rate; FlashAttention-2, which is made alike, reaches 350 to 400 Tflop/s there. Where it should end up: a warp reads
// each tile from shared memory for 16 rows, 2 mma for 512 bytes or 4 cycles, so half of the tensor cores' peak is the
// bound.
#define PREFILL_ATTENTION(HEAD_DIM, KEYS, SUFFIX, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(prefill_attention::THREADS) prefill_attention_##HEAD_DIM##_##SUFFIX(  \
        const float* qkv, const int* positions, const int* table_starts, const int* block_tables, const int* tiles,    \
        const void* pages, int heads, int kv_heads, int block_size, float scale, float* out) {                         \
        prefill_attention::attention<T, HEAD_DIM, KEYS>(qkv, Rows{positions, table_starts, block_tables}, tiles,       \
                                                        static_cast<const T*>(pages), heads, kv_heads, block_size,     \
                                                        scale, out);                                                   \
    }                                                                                                                  \
    REGISTER(prefill_attention_##HEAD_DIM##_##SUFFIX)

PREFILL_ATTENTION(64, 64, f16, F16);
PREFILL_ATTENTION(96, 64, f16, F16);
PREFILL_ATTENTION(128, 64, f16, F16);
PREFILL_ATTENTION(256, 16, f16, F16);
PREFILL_ATTENTION(64, 64, bf16, BF16);
PREFILL_ATTENTION(96, 64, bf16, BF16);
PREFILL_ATTENTION(128, 64, bf16, BF16);
PREFILL_ATTENTION(256, 16, bf16, BF16);
PREFILL_ATTENTION(64, 64, f8, F8);
PREFILL_ATTENTION(96, 64, f8, F8);
PREFILL_ATTENTION(128, 64, f8, F8);
PREFILL_ATTENTION(256, 16, f8, F8);
