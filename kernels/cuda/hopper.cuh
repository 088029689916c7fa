// Instructions that compute capability 9.0 has and no other (sm_90a): copies of boxes of a matrix to shared memory by
// the tensor memory accelerator (TMA), barriers that count the bytes of such copies (mbarrier), and products by four
// warps together whose operands stay in shared memory, the first one in registers if need be (wgmma). All of it goes on
// by itself once it is asked for, and is waited for. Below the instructions, for the emulation, stands what they do,
// from the PTX ISA; kernels/emulated/simt/hopper.h has what takes more than a line.
#pragma once

#include "common.cuh"

/// A matrix as the TMA sees it, and the boxes it is taken in: what Driver::tensor_map makes. Kernels take it as
/// `const __grid_constant__`, and it is read where it was passed.
struct alignas(128) TensorMap {
    uint64_t words[16];
};

/// In shared memory: threads that arrive and bytes that arrive, in phases. A phase is over when as many threads have
/// arrived as it was made for, and all bytes that were announced.
struct Barrier {
    uint64_t word;
};

/// Columns of a box, of 16-bit elements, and bytes of its rows: what is swizzled by itself.
constexpr int BOX_COLS = 64;
constexpr int BOX_ROW = 128;
/// Where a box begins is a multiple of this: eight rows, after which the swizzle begins anew.
constexpr int BOX_ALIGNMENT = 8 * BOX_ROW;
/// Four warps, which multiply together: 64 rows of the result.
constexpr int WARPGROUP = 4 * WARP;
constexpr int GROUP_ROWS = 64;
/// Columns of the operands that one product takes.
constexpr int PRODUCT_COLS = 16;

/// Shared memory that was asked for at the launch, from the first place in it where a box may begin: BOX_ALIGNMENT
/// bytes less, at most.
__device__ __forceinline__ unsigned char* aligned_shared();

/// The address of something in shared memory there.
__device__ __forceinline__ unsigned shared_place(const void* pointer);

/// The matrix at an address of shared memory, for `multiply_boxes`: its rows are those of a box. From the PTX ISA,
/// "Matrix Descriptor Format": bits 0-13 the start address, 16-29 the leading dimension's byte offset (not used where a
/// row of the operand lies within the swizzle), 32-45 the stride dimension's, from eight rows to the next eight, all
/// three in units of 16 bytes; 49-51 0, as patterns begin at multiples of 1024 bytes; 62-63 1, for a swizzle of 128
/// bytes.
__device__ __forceinline__ uint64_t operand(unsigned place) {
    return (place & 0x3ffff) >> 4 | uint64_t{BOX_ALIGNMENT >> 4} << 32 | uint64_t{1} << 62;
}

/// The matrix at an address of shared memory, for `multiply_held`: rows of a box are rows of it here ("MN-major"), and
/// what a product takes are 16 of them. From the PTX ISA, "Strides": here the leading dimension's offset is that from
/// 64 columns, which a row of a box has, to the next 64, which are in another box; the stride dimension's is from eight
/// rows to the next eight as above.
__device__ __forceinline__ uint64_t operand_across(unsigned place, unsigned to_next_box) {
    return operand(place) | uint64_t{to_next_box >> 4} << 16;
}

/// How much further on the operand is that begins so many bytes later. Within a row of a box too: the swizzle is one of
/// addresses.
__device__ __forceinline__ uint64_t further(unsigned bytes) { return bytes >> 4; }

// The layout of the result, from the PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": of warp w (of the
// four), element d[i] of a lane is
//
//     row = 16 w + lane / 4 + 8 (i / 2 % 2)
//     col = 8 (i / 4) + 2 (lane % 4) + i % 2
//
// and of a first operand in registers, of 16 columns, the same: two of its elements side by side are a register.
struct Fragment {
    static __device__ __forceinline__ int row(int i) { return warp_id() % 4 * 16 + lane_id() / 4 + i / 2 % 2 * 8; }
    static __device__ __forceinline__ int col(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
};

/// Where a sixteen-byte chunk of a row lies in a box, in bytes: as the TMA puts it there.
__device__ __forceinline__ int swizzled_chunk(int row, int chunk) { return row * BOX_ROW + (chunk ^ row % 8) * 16; }

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_place(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* aligned_shared() {
    extern __shared__ __align__(16) unsigned char asked_for[];
    return asked_for + (0u - shared_place(asked_for)) % BOX_ALIGNMENT;
}

/// Makes a barrier for phases of so many arrivals. One thread does.
__device__ __forceinline__ void make_barrier(Barrier* barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_place(barrier)), "r"(arrivals) : "memory");
}

/// Shows the barriers that this thread has made to the TMA. To the other threads: __syncthreads.
__device__ __forceinline__ void show_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Says that a matrix' description will be wanted soon.
__device__ __forceinline__ void announce(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Shows what kernels before this one stored to what copies boxes after this. (That they have ended should be enough,
/// and is what CUTLASS relies on; by the letter of the memory model, stores and copies of boxes see memory each in
/// their own way.)
__device__ __forceinline__ void show_rows() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

/// One arrival.
__device__ __forceinline__ void arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_place(barrier)) : "memory");
}

/// One arrival, and the announcement of so many bytes.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_place(barrier)),
                 "r"(bytes)
                 : "memory");
}

/// Waits for the end of the phase under way if `parity` is its number's last bit; the one before it is over. A barrier
/// whose phases nobody ends would hold the device for ever: after ten seconds the kernel ends with an error.
__device__ __forceinline__ void wait_for(Barrier* barrier, unsigned parity) {
    const auto is_over = [&] {
        unsigned over;
        asm volatile(
            "{\n"
            ".reg .pred over;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 over, [%1], %2;\n"
            "selp.u32 %0, 1, 0, over;\n"
            "}"
            : "=r"(over)
            : "r"(shared_place(barrier)), "r"(parity)
            : "memory");
        return over != 0;
    };
    const auto nanoseconds = [] {
        unsigned long long now;
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        return now;
    };
    if (is_over()) return;
    const unsigned long long began = nanoseconds();
    while (!is_over()) {
        // (Not __trap(): where a kernel may end like that, the compiler takes no notice of `take_registers`.)
        if (nanoseconds() - began > 10'000'000'000) asm volatile("st.global.u32 [%0], 0;" ::"l"(0ull) : "memory");
    }
}

/// Copies the box whose first element is (row, col) to shared memory, where its bytes arrive at the barrier's phase
/// under way. What is beyond the matrix is zeros. One thread does.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int row, int col, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_place(to)),
        "l"(&map), "r"(col), "r"(row), "r"(shared_place(barrier))
        : "memory");
}

/// Sixteen bytes of an operand that threads store themselves: the `chunk`th of a row of a box, or of rows that lie as
/// one does.
__device__ __forceinline__ void store_operand(unsigned char* box, int row, int chunk, uint4 bytes) {
    *reinterpret_cast<uint4*>(box + swizzled_chunk(row, chunk)) = bytes;
}

/// Shows what this thread has stored to products, which see shared memory in another way than threads do. To those that
/// others ask for: and a barrier.
__device__ __forceinline__ void show_operands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Here registers have their values: the compiler moves nothing that makes these, or takes them, to the other side.
template <int COUNT>
__device__ __forceinline__ void settle(float (&values)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(values[i])::"memory");
}

/// Leaves a thread of this group of four warps so many registers, and others the rest; or waits until it has so many.
/// All threads of a kernel are launched with the same number, of those there are for a block.
template <int REGISTERS>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/// Stands between what threads do with registers and the products that add to them.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// The same where they add to sums that are something already, and read registers: those have their values here.
template <int COUNT, int STEPS>
__device__ __forceinline__ void begin_products(float (&sums)[COUNT], unsigned (&held)[STEPS][4]) {
    settle(sums);
#pragma unroll
    for (int i = 0; i < STEPS * 4; i++) asm volatile("" : "+r"(held[i / 4][i % 4])::"memory");
    begin_products();
}

/// Makes the products since the last call one group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits for this warp's products, those of its latest group excepted: they have read their operands.
__device__ __forceinline__ void wait_for_products_but_one() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

/// The same. From here on these sums of theirs may be looked at.
template <int COUNT>
__device__ __forceinline__ void wait_for_products_but_one(float (&sums)[COUNT]) {
    wait_for_products_but_one();
    settle(sums);
}

/// Waits for all of them. From here on their sums may be looked at, and no earlier.
template <int COUNT>
__device__ __forceinline__ void wait_for_products(float (&sums)[COUNT]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    settle(sums);
}

template <class T, int COUNT>
struct Multiply;

/// sums += a bᵀ (or sums = a bᵀ, if it does not add), some time before it is waited for: a of [64, 16], b of [N, 16],
/// sums of [64, N] as fragments.
template <class T, bool ADDS = true, int COUNT>
__device__ __forceinline__ void multiply_boxes(float (&sums)[COUNT], uint64_t a, uint64_t b) {
    Multiply<T, COUNT>::template boxes<ADDS>(sums, a, b);
}

/// sums += a b, for a in registers, which stay as they are until it is waited for, and b of [16, N], `operand_across`.
template <class T, int COUNT>
__device__ __forceinline__ void multiply_held(float (&sums)[COUNT], const unsigned (&a)[4], uint64_t b) {
    Multiply<T, COUNT>::held(sums, a, b);
}

#define REGISTERS_32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_48                                                                                                   \
    REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_64                                                                                                   \
    REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_96                                                                                                   \
    REGISTERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "   \
                 "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128                                                                                                  \
    REGISTERS_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SUMS_32 SIXTEEN(0), SIXTEEN(16)
#define SUMS_48 SUMS_32, SIXTEEN(32)
#define SUMS_64 SUMS_48, SIXTEEN(48)
#define SUMS_96 SUMS_64, SIXTEEN(64), SIXTEEN(80)
#define SUMS_128 SUMS_96, SIXTEEN(96), SIXTEEN(112)

// Behind the registers: the operands, whether sums are added to, that neither operand is negated, and for those in
// shared memory whether they lie across: not with rows as rows.
#define MULTIPLY(T, TYPE, COUNT, N, A, B, C, D, E)                                                                     \
    template <>                                                                                                        \
    struct Multiply<T, COUNT> {                                                                                        \
        template <bool ADDS>                                                                                           \
        static __device__ __forceinline__ void boxes(float(&sums)[COUNT], uint64_t a, uint64_t b) {                    \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS_##COUNT         \
                         "}, %" A ", %" B ", %" C ", 1, 1, 0, 0;"                                                      \
                         : SUMS_##COUNT                                                                                \
                         : "l"(a), "l"(b), "n"(ADDS ? 1 : 0)                                                           \
                         : "memory");                                                                                  \
        }                                                                                                              \
        static __device__ __forceinline__ void held(float(&sums)[COUNT], const unsigned(&a)[4], uint64_t b) {          \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" REGISTERS_##COUNT         \
                         "}, {%" A ", %" B ", %" C ", %" D "}, %" E ", 1, 1, 1, 1;"                                    \
                         : SUMS_##COUNT                                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                          \
                         : "memory");                                                                                  \
        }                                                                                                              \
    };
#define MULTIPLY_BY(T, TYPE)                                                                                           \
    MULTIPLY(T, TYPE, 32, "64", "32", "33", "34", "35", "36")                                                          \
    MULTIPLY(T, TYPE, 64, "128", "64", "65", "66", "67", "68")                                                         \
    MULTIPLY(T, TYPE, 96, "192", "96", "97", "98", "99", "100")                                                        \
    MULTIPLY(T, TYPE, 128, "256", "128", "129", "130", "131", "132")
MULTIPLY_BY(F16, "f16")
MULTIPLY_BY(BF16, "bf16")
#undef MULTIPLY_BY
#undef MULTIPLY
#undef SUMS_128
#undef SUMS_96
#undef SUMS_64
#undef SUMS_48
#undef SUMS_32
#undef SIXTEEN
#undef FOUR

#else

inline unsigned shared_place(const void* pointer) { return simt::shared_place(pointer); }
inline unsigned char* aligned_shared() {
    unsigned char* const start = simt::shared_start();
    return start + (0u - shared_place(start)) % BOX_ALIGNMENT;
}

inline void make_barrier(Barrier* barrier, unsigned arrivals) { simt::make_barrier(&barrier->word, arrivals); }
inline void show_barriers() { simt::show_barriers(); }
inline void announce(const TensorMap&) {}
inline void show_rows() {}
inline void arrive(Barrier* barrier) { simt::arrive(&barrier->word, 0); }
inline void arrive_expecting(Barrier* barrier, unsigned bytes) { simt::arrive(&barrier->word, bytes); }
inline void wait_for(Barrier* barrier, unsigned parity, int line = __builtin_LINE()) {
    simt::wait_for(&barrier->word, parity, line);
}
inline void copy_box(void* to, const TensorMap& map, int row, int col, Barrier* barrier) {
    simt::copy_box(to, map.words, row, col, &barrier->word);
}

inline void store_operand(unsigned char* box, int row, int chunk, uint4 bytes) {
    simt::store_operand(box + swizzled_chunk(row, chunk), bytes);
}
inline void show_operands() { simt::show_operands(); }

template <int COUNT>
void settle(float (&)[COUNT]) {}
template <int REGISTERS>
void leave_registers() {}
template <int REGISTERS>
void take_registers() {}

inline void begin_products(int line = __builtin_LINE()) { simt::begin_products(line); }
template <int COUNT, int STEPS>
void begin_products(float (&)[COUNT], unsigned (&held)[STEPS][4], int line = __builtin_LINE()) {
    simt::hold(held[0], STEPS * 4);
    simt::begin_products(line);
}
inline void commit_products(int line = __builtin_LINE()) { simt::commit_products(line); }
inline void wait_for_products_but_one(int line = __builtin_LINE()) { simt::wait_for_products(1, line); }
template <int COUNT>
void wait_for_products_but_one(float (&)[COUNT], int line = __builtin_LINE()) {
    simt::wait_for_products(1, line);
}
template <int COUNT>
void wait_for_products(float (&)[COUNT], int line = __builtin_LINE()) {
    simt::wait_for_products(0, line);
}
template <class T, bool ADDS = true, int COUNT>
void multiply_boxes(float (&sums)[COUNT], uint64_t a, uint64_t b, int line = __builtin_LINE()) {
    simt::multiply_boxes(sums, COUNT, ADDS, a, b, [](uint16_t bits) { return to_float(T{bits}); }, line);
}
template <class T, int COUNT>
void multiply_held(float (&sums)[COUNT], const unsigned (&a)[4], uint64_t b, int line = __builtin_LINE()) {
    simt::multiply_held(sums, COUNT, a, b, [](uint16_t bits) { return to_float(T{bits}); }, line);
}

#endif
