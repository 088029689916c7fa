// Tensor cores: products of small matrices by a warp (mma), the loads from shared memory that go with them (ldmatrix),
// and copies from device to shared memory that nobody's registers hold (cp.async). Everything from compute capability
// 8.0 on has them. Below the instructions, for the emulation, stands what they do, from the PTX ISA.
#pragma once

#include "common.cuh"

/// Sixteen bytes: eight elements of a tile in shared memory.
using Chunk = uint4;
constexpr int CHUNK = 8;

/// Shared memory of the block. Whoever calls it again with the same COUNT gets the same memory.
template <int COUNT>
__device__ __forceinline__ Chunk* shared_chunks() {
    static_assert(COUNT * sizeof(Chunk) <= 48 << 10, "what a block gets without asking");
    __shared__ Chunk chunks[COUNT];
    return chunks;
}

/// Where a chunk of a row lies in a tile whose rows have WIDTH of them. Eight rows' chunks of one column, which is what
/// ldmatrix reads at a time, lie in all 32 banks: chunks of a row change places, differently in each row.
template <int WIDTH>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(WIDTH % 8 == 0 || WIDTH % 8 == 4, "rows of whole or half lines of 128 bytes");
    return row * WIDTH + (WIDTH % 8 == 0 ? chunk ^ row % 8 : chunk ^ row / 2 % 4);
}

/// Two elements as a register of a fragment, the first in its lower half.
template <class T>
__device__ __forceinline__ unsigned pair(float low, float high);

// The layouts, from the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type":
//
//     groupID           = %laneid >> 2
//     threadID_in_group = %laneid % 4
//     A:    row = groupID for ai where 0 <= i < 2 || 4 <= i < 6, groupID + 8 otherwise
//           col = (threadID_in_group * 2) + (i & 0x1) for ai where i < 4, the same + 8 for ai where i >= 4
//     B:    row = (threadID_in_group * 2) + (i & 0x1) for bi where i < 2, the same + 8 for bi where i >= 2
//           col = groupID
//     C, D: row = groupID for ci where i < 2, groupID + 8 for ci where i >= 2
//           col = (threadID_in_group * 2) + (i & 0x1) for ci where i = {0,..,3}
//
// and of ldmatrix, "Warp-level matrix load instruction": with .x4, addr0-addr7, addr8-addr15, addr16-addr23 and
// addr24-addr31 are those of the rows of four matrices of 8x8; "a group of four threads loads an entire row", thread 0
// its first two elements. With .trans, matrices are loaded "in column-major format".

#ifdef __CUDACC__

template <>
__device__ __forceinline__ unsigned pair<F16>(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return static_cast<unsigned>(__half_as_ushort(both.x)) | static_cast<unsigned>(__half_as_ushort(both.y)) << 16;
}
template <>
__device__ __forceinline__ unsigned pair<BF16>(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return static_cast<unsigned>(__bfloat16_as_ushort(both.x)) |
           static_cast<unsigned>(__bfloat16_as_ushort(both.y)) << 16;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

/// Four matrices of 8x8 elements. Lane l says where row l % 8 of matrix l / 8 is. It gets of each matrix two elements
/// side by side: 2 (l % 4) and the next, of row l / 4.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const Chunk* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// The same, transposed: the lane gets of each matrix two elements one below the other, of column l / 4.
__device__ __forceinline__ void load_transposed(unsigned (&to)[4], const Chunk* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// c += a b, for a of [16, 16], b of [16, 8] and c of [16, 8], as fragments.
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high);

#define MULTIPLY_ADD(T, TYPE)                                                                                        \
    template <>                                                                                                      \
    __device__ __forceinline__ void multiply_add<T>(float(&c)[4], const unsigned(&a)[4], unsigned b_low,             \
                                                    unsigned b_high) {                                               \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                          \
                     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));                         \
    }
MULTIPLY_ADD(F16, "f16")
MULTIPLY_ADD(BF16, "bf16")
#undef MULTIPLY_ADD

/// Copies a chunk to shared memory, or zeros if it is not `valid`, some time before this thread's `wait_for_copies`
/// of the group it belongs to.
__device__ __forceinline__ void copy_async(Chunk* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/// Makes the copies since the last call one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for this thread's copies, those of its latest LATEST groups excepted. For those of others: and a barrier.
template <int LATEST>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}

#else

template <>
inline unsigned pair<F16>(float low, float high) {
    return to_f16(low).bits | static_cast<unsigned>(to_f16(high).bits) << 16;
}
template <>
inline unsigned pair<BF16>(float low, float high) {
    return to_bf16(low).bits | static_cast<unsigned>(to_bf16(high).bits) << 16;
}

inline void load_matrices(unsigned (&to)[4], const Chunk* row, int line = __builtin_LINE()) {
    const auto rows = simt::exchange(ALL_LANES, row, line);
    const unsigned lane = simt::lane();
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        std::memcpy(&to[matrix], reinterpret_cast<const uint16_t*>(rows[matrix * 8 + lane / 4]) + lane % 4 * 2, 4);
    }
}

inline void load_transposed(unsigned (&to)[4], const Chunk* row, int line = __builtin_LINE()) {
    const auto rows = simt::exchange(ALL_LANES, row, line);
    const unsigned lane = simt::lane();
    for (unsigned matrix = 0; matrix < 4; matrix++) {
        const unsigned upper = matrix * 8 + lane % 4 * 2;
        to[matrix] = reinterpret_cast<const uint16_t*>(rows[upper])[lane / 4] |
                     static_cast<unsigned>(reinterpret_cast<const uint16_t*>(rows[upper + 1])[lane / 4]) << 16;
    }
}

/// Each lane shows its part of a and b, and computes its part of c: element after element, with fused multiply-adds.
/// (In which order the device adds up sixteen products, and with how many bits, is not documented.)
template <class T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b_low, unsigned b_high,
                  int line = __builtin_LINE()) {
    struct Fragments {
        float a[8], b[4];
    } mine;
    const auto unpack = [](float* to, unsigned both) {
        to[0] = to_float(T{static_cast<uint16_t>(both)}), to[1] = to_float(T{static_cast<uint16_t>(both >> 16)});
    };
    for (int i = 0; i < 4; i++) unpack(mine.a + 2 * i, a[i]);
    unpack(mine.b, b_low), unpack(mine.b + 2, b_high);
    const auto shown = simt::exchange(ALL_LANES, mine, line);
    const auto of = [&](unsigned lane) {
        return reinterpret_cast<const Fragments*>(shown.slots + lane * simt::EXCHANGE);
    };
    const unsigned group = simt::lane() / 4, member = simt::lane() % 4;
    float rows[2][16], columns[2][16];
    for (unsigned k = 0; k < 16; k++) {
        const unsigned holder = k % 8 / 2, half = k / 8, which = k % 2;
        for (unsigned i = 0; i < 2; i++) {
            rows[i][k] = of(group * 4 + holder)->a[4 * half + 2 * i + which];
            columns[i][k] = of((2 * member + i) * 4 + holder)->b[2 * half + which];
        }
    }
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned i = 0; i < 4; i++) c[i] = std::fma(rows[i / 2][k], columns[i % 2][k], c[i]);
    }
}

inline void copy_async(Chunk* to, const void* from, bool valid) { simt::copy_later(to, from, valid); }
inline void commit_copies() { simt::commit_copies(); }
template <int LATEST>
void wait_for_copies() {
    simt::wait_for_copies(LATEST);
}

#endif

/// What this lane passes to `load_matrices` for 16 rows and two chunks of a tile: the four registers of a, with rows of
/// the tile as rows of a. To `load_transposed`: those of b for two products side by side, with rows of the tile as rows
/// of b.
template <int WIDTH>
__device__ __forceinline__ const Chunk* upright(const Chunk* tile, int row, int chunk) {
    return tile + swizzled<WIDTH>(row + lane_id() % 16, chunk + lane_id() / 16);
}

/// To `load_matrices` for the registers of b for two products side by side, with rows of the tile as columns of b.
template <int WIDTH>
__device__ __forceinline__ const Chunk* lying(const Chunk* tile, int row, int chunk) {
    return tile + swizzled<WIDTH>(row + lane_id() / 16 * 8 + lane_id() % 8, chunk + lane_id() / 8 % 2);
}
