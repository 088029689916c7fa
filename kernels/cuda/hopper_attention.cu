// Causal attention of prompts over paged keys and values, on devices that have wgmma (compute capability 9.0): what
// prefill_attention.cu is to the others, made as FlashAttention-3 is (Shah et al. 2024).
//
// A block takes one query head of up to 128 consecutive tokens of a sequence, a group of four warps 64 of them, and
// goes through the keys in tiles from the sequence's start: of 128 keys, or 64 for heads of 256 elements, which leave
// registers for no more. A warp of a third group has keys and values copied to shared memory, a tile of either at a
// time, as boxes: a page's part of a tile, 64 columns wide. It fills a slot anew when the groups are done with it
// (`empty`), and they wait until one is filled (`full`). Nothing else passes between the groups, so that one multiplies
// while the other weighs. And in a group scores of the next tile are asked for before the sums of values of this one,
// so that tensor cores have these to multiply while those are weighed. Scores, softmax and sums stay in registers, and
// so do rounded weights, which are the first operand of the product with values; queries are in shared memory.
//
// What is rounded, and what a row's bits depend on, is as in prefill_attention.cu: on the row and its sequence's keys
// and values up to it, as tiles of keys are at fixed places, come in order, and a masked key contributes exactly
// nothing.
//
// Boxes are of whole pages: what lies behind the last token comes with them, and may be anything. Scores of it are
// masked, as those of later tokens are, and its values made zeros in shared memory, as a weight of 0 needs a number to
// multiply. (So a value of a later token of this sequence that is no number spoils earlier ones in the same tiles.)

#include "hopper.cuh"
#include "mma.cuh"
#include "pages.cuh"
#include "softmax.cuh"

namespace hopper_attention {

constexpr int GROUPS = 2;
/// The warp that copies is the first of a group of its own, which leaves registers to the others: a thread of a block
/// with so many is launched with 168.
constexpr int COPIER = GROUPS * WARPGROUP / WARP;
constexpr int THREADS = (GROUPS + 1) * WARPGROUP;
constexpr int COPIER_REGISTERS = 40, REGISTERS = 232;
static_assert(COPIER_REGISTERS + GROUPS * REGISTERS <= (GROUPS + 1) * 168, "registers there are");
/// src/cuda/plan.rs cuts prompts into as many.
constexpr int ROWS = GROUPS * GROUP_ROWS;
/// Tiles of keys or values in shared memory. A group needs two of them at a time.
constexpr int SLOTS = 5;

/// A block's tiles, of heads of HEAD_DIM elements. Boxes of 64 columns lie one behind the other; what the last one has
/// beyond the head is zeros.
template <int HEAD_DIM_, int KEYS_>
struct Tile {
    static constexpr int HEAD_DIM = HEAD_DIM_, KEYS = KEYS_, BOXES = (HEAD_DIM + BOX_COLS - 1) / BOX_COLS;
    /// Bytes of 64 columns of all keys, of a slot, of 64 columns of all queries, and of all queries.
    static constexpr int COLUMNS = KEYS * BOX_ROW, SLOT = BOXES * COLUMNS;
    static constexpr int QUERY_COLUMNS = ROWS * BOX_ROW, QUERIES = BOXES * QUERY_COLUMNS;
    static_assert(QUERIES + SLOTS * SLOT + BOX_ALIGNMENT <= 226 << 10, "shared memory there is");
};

/// The slot whose turn it is, and the last bit of how often it was its turn before.
struct Turn {
    int slot = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void pass() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
};

/// What threads of a block tell each other.
struct Signals {
    /// A slot is filled; all are done with what is in it.
    Barrier full[SLOTS], empty[SLOTS];
    /// Of the last tile of values nothing is left that no token of the sequence has.
    Barrier cleared;

    __device__ __forceinline__ void make(int groups) {
        for (int i = 0; i < SLOTS; i++) {
            make_barrier(full + i, 1);
            make_barrier(empty + i, max(groups, 1) * WARPGROUP / WARP);
        }
        make_barrier(&cleared, 1);
        show_barriers();
    }
};

/// What a block computes: one head of `count` rows from `first` on, whose tokens are at `position` to `last`.
struct Work {
    int head, first, count, position, last;

    __device__ __forceinline__ int groups() const { return (count + GROUP_ROWS - 1) / GROUP_ROWS; }
    /// Tiles of keys of all rows up to this one.
    template <class Tile>
    __device__ __forceinline__ int steps(int row) const {
        return count > 0 ? (position + min(row, count - 1)) / Tile::KEYS + 1 : 0;
    }
};

/// Has tiles of keys and values copied, in turns.
template <class Tile>
struct Copier {
    const TensorMap& pages;
    Signals& signals;
    unsigned char* slots;
    const int* table;
    int kv_heads, kv_head, block_size, last, tiles;
    /// The tile whose turn it is, and where it goes.
    int tile = 0;
    Turn turn{};
    /// Where this lane copies from.
    int page = 0;

    /// Rows of a box: tokens that a page has in a tile. Each lane takes those of a page.
    __device__ __forceinline__ int box_rows() const { return min(block_size, Tile::KEYS); }
    __device__ __forceinline__ int key() const { return tile / 2 * Tile::KEYS + lane_id() * box_rows(); }
    __device__ __forceinline__ bool copies() const {
        return lane_id() * box_rows() < Tile::KEYS && key() <= last && tile < tiles;
    }
    /// Looks up the pages of the next tile of keys, which are those of values too. (Pages have 2^shift tokens, so that
    /// no address takes a division.)
    __device__ __forceinline__ void look_up() {
        if (copies()) page = planned_word(table + (key() >> (__ffs(block_size) - 1)));
    }
    __device__ __forceinline__ void copy() {
        Barrier* const full = signals.full + turn.slot;
        const int keys = min(Tile::KEYS, last + 1 - tile / 2 * Tile::KEYS);
        const int rows = (keys + box_rows() - 1) & -box_rows();
        if (lane_id() == 0) arrive_expecting(full, Tile::BOXES * rows * BOX_ROW);
        __syncwarp();
        if (copies()) {
            const int row = ((page * kv_heads + kv_head) * 2 + tile % 2) * block_size + (key() & (block_size - 1));
            unsigned char* const to = slots + turn.slot * Tile::SLOT + lane_id() * box_rows() * BOX_ROW;
#pragma unroll
            for (int box = 0; box < Tile::BOXES; box++) {
                copy_box(to + box * Tile::COLUMNS, pages, row, box * BOX_COLS, full);
            }
        }
        turn.pass();
        if (++tile % 2 == 0) look_up();
    }
    /// Fills slots for the first time.
    __device__ __forceinline__ void begin() {
        while (tile < min(tiles, SLOTS)) copy();
    }
    /// Fills them anew until all tiles were there; then the values behind the last token become zeros.
    __device__ __forceinline__ void finish() {
        while (tile < tiles) {
            wait_for(signals.empty + turn.slot, turn.parity ^ 1);
            copy();
        }
        if (tiles == 0) return;
        const int slot = (tiles - 1) % SLOTS, behind = last % Tile::KEYS + 1;
        wait_for(signals.full + slot, (tiles - 1) / SLOTS % 2);
        for (int i = behind * (BOX_ROW / 16) + lane_id(); i < Tile::COLUMNS / 16; i += WARP) {
#pragma unroll
            for (int box = 0; box < Tile::BOXES; box++) {
                unsigned char* const values = slots + slot * Tile::SLOT + box * Tile::COLUMNS;
                store_operand(values, i / (BOX_ROW / 16), i % (BOX_ROW / 16), uint4{0, 0, 0, 0});
            }
        }
        show_operands();
        __syncwarp();
        if (lane_id() == 0) arrive(&signals.cleared);
    }
};

/// Rounds a group's queries and puts them where products find them, the group's rows of each 64 columns.
template <class T, class Tile>
__device__ __forceinline__ void store_queries(const float* qkv, int stride, const Work& work, int group,
                                              unsigned char* queries) {
    // Sixteens of a row, and those of all rows that a thread takes, a few at a time.
    constexpr int CHUNKS = Tile::HEAD_DIM / 8, EACH = GROUP_ROWS * CHUNKS / WARPGROUP, FEW = EACH < 8 ? EACH : 8;
    static_assert(EACH * WARPGROUP == GROUP_ROWS * CHUNKS && EACH % FEW == 0, "threads share evenly");
    const int thread = static_cast<int>(threadIdx.x) % WARPGROUP;
#pragma unroll 1
    for (int begin = 0; begin < EACH; begin += FEW) {
        uint4 rounded[FEW];
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            const int at = thread + (begin + i) * WARPGROUP, row = group * GROUP_ROWS + at / CHUNKS;
            float eight[8] = {};
            if (row < work.count) {
                const float* const head = qkv + static_cast<size_t>(work.first + row) * stride;
                load8(head + work.head * Tile::HEAD_DIM + at % CHUNKS * 8, eight);
            }
            rounded[i] = {pair<T>(eight[0], eight[1]), pair<T>(eight[2], eight[3]), pair<T>(eight[4], eight[5]),
                          pair<T>(eight[6], eight[7])};
        }
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            const int at = thread + (begin + i) * WARPGROUP, chunk = at % CHUNKS;
            unsigned char* const box = queries + chunk / 8 * Tile::QUERY_COLUMNS;
            store_operand(box, group * GROUP_ROWS + at / CHUNKS, chunk % 8, rounded[i]);
        }
    }
    show_operands();
}

/// A group's rows. `steps` of all groups, `unit` as Softmax::weigh has it; out: where the first row's head begins.
template <class T, class Tile>
__device__ __forceinline__ void compute(Signals& signals, unsigned queries, unsigned slots, const Work& work, int warp,
                                        int steps, float unit, float* out, int stride) {
    constexpr int HEAD_DIM = Tile::HEAD_DIM, KEYS = Tile::KEYS;
    const int group = warp / 4, group_row = group * GROUP_ROWS, my_row = group_row + Fragment::row(0);
    const int my_steps = work.steps<Tile>(group_row + GROUP_ROWS - 1);
    const uint64_t all_queries = operand(queries + group_row * BOX_ROW);
    const uint64_t all_keys = operand(slots), all_values = operand_across(slots, Tile::COLUMNS);
    // Of whole boxes: an operand that lies across and ends amid the 64 columns of a swizzle is one that nobody else
    // has, nor the PTX ISA speaks of. What is beyond the head is zeros.
    float scores[KEYS / 2], sums[Tile::BOXES * BOX_COLS / 2] = {}, rescale[2];
    unsigned weights[KEYS / PRODUCT_COLS][4];
    Softmax softmax;
    Turn keys, values;
    values.pass();

    const auto ask_for_scores = [&] {
#pragma unroll
        for (int i = 0; i < HEAD_DIM / PRODUCT_COLS; i++) {
            const int box = i * PRODUCT_COLS / BOX_COLS, at = i * PRODUCT_COLS % BOX_COLS * 2;
            const uint64_t a = all_queries + further(box * Tile::QUERY_COLUMNS + at);
            const uint64_t b = all_keys + further(keys.slot * Tile::SLOT + box * Tile::COLUMNS + at);
            if (i == 0) {
                multiply_boxes<T, false>(scores, a, b);
            } else {
                multiply_boxes<T>(scores, a, b);
            }
        }
        commit_products();
    };
    const auto ask_for_values = [&] {
        wait_for(signals.full + values.slot, values.parity);
#pragma unroll
        for (int i = 0; i < KEYS / PRODUCT_COLS; i++) {
            const int at = values.slot * Tile::SLOT + i * PRODUCT_COLS * BOX_ROW;
            multiply_held<T>(sums, weights[i], all_values + further(at));
        }
        commit_products();
    };
    const auto is_done_with = [&](Turn& turn) {
        if (lane_id() == 0) arrive(signals.empty + turn.slot);
        turn.pass();
        turn.pass();
    };
    const auto weigh = [&](int step) {
        const auto score = [&](int i) -> float& { return scores[i]; };
        if ((step + 1) * KEYS - 1 > work.position + group_row + warp % 4 * 16) {
            Softmax::mask<KEYS / 2>(score, step * KEYS, work.position + my_row);
        }
        softmax.weigh<KEYS / 2>(score, unit, rescale);
    };
    // What a lane has of a result is what it has of a first operand.
    const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 2) weights[i / 8][i % 8 / 2] = pair<T>(scores[i], scores[i + 1]);
    };

    wait_for(signals.full + keys.slot, keys.parity);
    begin_products();
    ask_for_scores();
    wait_for_products(scores);
    is_done_with(keys);
    weigh(0);
    round_weights();
    if (my_steps > 1) wait_for(signals.full + keys.slot, keys.parity);
#pragma unroll 1
    for (int step = 1; step < my_steps; step++) {
        begin_products(sums, weights);
        ask_for_scores();
        ask_for_values();
        wait_for_products_but_one(scores);
        is_done_with(keys);
        weigh(step);
        settle(scores);
        // (Before the values are multiplied: what is not weighed before a branch, the compiler weighs behind them.)
        if (step + 1 < my_steps) wait_for(signals.full + keys.slot, keys.parity);
        wait_for_products(sums);
        is_done_with(values);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) sums[i] *= rescale[i / 2 % 2];
        round_weights();
    }
    // All keys of the tile before the last are tokens of the sequence.
    if (my_steps == steps) wait_for(&signals.cleared, 0);
    begin_products(sums, weights);
    ask_for_values();
    wait_for_products(sums);

    // All lanes meet here; then each writes what it has of rows that there are.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Divided once: a division is a dozen instructions, and nothing else runs beside this end.
        const float share = 1.0f / softmax.total(half);
        const int row = my_row + half * 8;
        if (row >= work.count) continue;
        float* const to = out + static_cast<size_t>(row) * stride + Fragment::col(0);
#pragma unroll
        for (int i = half * 2; i < HEAD_DIM / 2; i += 4) {
            const uint2 two = {__float_as_uint(sums[i] * share), __float_as_uint(sums[i + 1] * share)};
            *reinterpret_cast<uint2*>(to + i * 2 - half * 4) = two;
        }
    }
}

template <class T, class Tile>
__device__ __forceinline__ void attention(const TensorMap& pages, const float* qkv, Rows rows, const int* tiles,
                                          int heads, int kv_heads, int block_size, float scale, float* out) {
    __shared__ Signals signals;
    unsigned char* const queries = aligned_shared();
    unsigned char* const slots = queries + Tile::QUERIES;
    // Where lanes of a warp could part, as far as the compiler knows, it has each product waited for.
    const int warp = __shfl_sync(ALL_LANES, warp_id(), 0), block = static_cast<int>(blockIdx.x);
    const int* const planned = tiles + block / heads * 2;
    const int first = planned_word(planned), count = planned_word(planned + 1);
    const int position = rows.position(first);
    const Work work{block % heads, first, count, position, position + count - 1};
    const int steps = work.steps<Tile>(ROWS - 1);
    Copier<Tile> copier{pages,    signals,    slots,         rows.table(first),
                        kv_heads, work.head / (heads / kv_heads), block_size, work.last, 2 * steps};
    if (warp == COPIER) {
        if (lane_id() == 0) {
            announce(pages);
            signals.make(work.groups());
        }
        __syncwarp();
        copier.look_up();
    }
    follow();
    if (warp == COPIER) {
        show_rows();
        copier.begin();
    } else if (warp / 4 < work.groups()) {
        store_queries<T, Tile>(qkv, padded((heads + 2 * kv_heads) * Tile::HEAD_DIM), work, warp / 4, queries);
    }
    __syncthreads();
    if (warp >= COPIER) {
        leave_registers<COPIER_REGISTERS>();
        if (warp == COPIER) copier.finish();
    } else if (warp / 4 < work.groups()) {
        take_registers<REGISTERS>();
        const int stride = padded(heads * Tile::HEAD_DIM);
        // exp(scale * x) is 2 to the power of unit * x.
        compute<T, Tile>(signals, shared_place(queries), shared_place(slots), work, warp, steps, scale * 1.44269504f,
                         out + static_cast<size_t>(first) * stride + work.head * Tile::HEAD_DIM, stride);
    }
}

}  // namespace hopper_attention

// hopper_attention_{head_dim}_{type of the cache}: what prefill_attention of that name does, in the same grid. pages: a
// matrix of [pages * kv_heads * 2 * block_size, head_dim], in boxes of 64 columns and what a page has of a tile in
// rows; pages are of a power of two of tokens, 8 at least. Shared memory: 97 KiB a block for heads of 64, 193 for 96
// and 128, 225 for 256; an SM holds one block. Operations: 4 head_dim a key, row and head; of the half that a whole
// prompt masks, those in the tiles it goes through. Bytes: keys and values of a tile's context, from the L2 cache, 4
// head_dim a key for 128 rows of a head, so 128 operations a byte; queries and output, 8 head_dim a row and head.
// Floor: the operations at the rate of wgmma, some 800 Tflop/s on an H100, but 600 if that cache gives no more than 4.7
// TB/s. Where it should end up: a tile of 128 keys and 128 rows is 2,048 cycles of an SM's tensor cores with heads of
// 128 elements; its operands are read from shared memory in 1,280 and copied there in 512; its exponentials take 1,024
// at 16 a cycle, and the rest of softmax some 500. If all this goes on side by side, as it is made to, the products are
// the bound; with heads of 64 elements they are half as long, and exponentials as long as they. FlashAttention-3, which
// is made alike, reaches up to 740 Tflop/s by its authors' word, and FlashAttention-2 350 to 400. A block multiplies
// nothing while its first keys and queries come and while it writes its rows; one of few keys does little else.
#define HOPPER_ATTENTION(HEAD_DIM, KEYS, SUFFIX, T)                                                                    \
    extern "C" __global__ void __launch_bounds__(hopper_attention::THREADS, 1) hopper_attention_##HEAD_DIM##_##SUFFIX( \
        const __grid_constant__ TensorMap pages, const float* qkv, const int* positions, const int* table_starts,      \
        const int* block_tables, const int* tiles, int heads, int kv_heads, int block_size, float scale, float* out) { \
        hopper_attention::attention<T, hopper_attention::Tile<HEAD_DIM, KEYS>>(                                        \
            pages, qkv, Rows{positions, table_starts, block_tables}, tiles, heads, kv_heads, block_size, scale, out);  \
    }                                                                                                                  \
    REGISTER(hopper_attention_##HEAD_DIM##_##SUFFIX)

HOPPER_ATTENTION(64, 128, f16, F16);
HOPPER_ATTENTION(96, 128, f16, F16);
HOPPER_ATTENTION(128, 128, f16, F16);
HOPPER_ATTENTION(256, 64, f16, F16);
HOPPER_ATTENTION(64, 128, bf16, BF16);
HOPPER_ATTENTION(96, 128, bf16, BF16);
HOPPER_ATTENTION(128, 128, bf16, BF16);
HOPPER_ATTENTION(256, 64, bf16, BF16);
