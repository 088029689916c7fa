// What CUDA C++ takes for granted, for kernels compiled by a host compiler.
//
// Each CUDA thread of a block is a fiber that runs until it meets the others: at __syncthreads, a shuffle or a vote, or
// waits for the kernel before its own. Blocks run one after the other on the launching thread, but for the first of a
// kernel that follows another: it begins before that has run, on a thread of its own. Which thread goes on first is
// shuffled from a seed, so a missing barrier shows as a wrong or varying result; and the threads that meet must have
// come to the same line, all of them, so divergence at a barrier is an error instead of a hang.
//
// Only what the kernels use is here. Tensor core instructions are what they are, an exchange of fragments between the
// lanes of a warp: cuda/mma.cuh has them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One copy a host thread; blocks of a launch run one after the other, so that is one copy a block.
#define __shared__ static thread_local
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
};

extern thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace simt {

constexpr unsigned WARP = 32;
/// Bytes a lane can show to the others at a time.
constexpr unsigned EXCHANGE = 64;

/// Waits for the end of the kernel before, which every thread does once.
void follow();

/// Waits until all threads of the block have come here. With how many of them the predicate held.
int meet_block(int line, bool predicate = false);

/// Where the lanes of this warp show something next, EXCHANGE bytes each. It stays until this lane exchanges again.
unsigned char* slots();

/// Waits until each lane of `mask` has come here.
void meet_warp(unsigned mask, int line);

inline unsigned lane() { return threadIdx.x % WARP; }

/// Copies 16 bytes, or zeros if they are not `valid`, when this thread waits for the group they belong to and not
/// before. What was there is gone at once.
void copy_later(void* to, const void* from, bool valid);

/// Makes the copies since the last call one group.
void commit_copies();

/// Waits for this thread's copies, its `latest` groups excepted.
void wait_for_copies(unsigned latest);

// What cuda/hopper.cuh is made of. Lines are those of the kernel.

/// Shared memory that the launch asked for: aligned to 16 bytes, and to no more on purpose. Not a number at first.
unsigned char* shared_start();

/// Where a pointer into it points there, in 18 bits.
unsigned shared_place(const void* pointer);

void make_barrier(std::uint64_t* barrier, unsigned arrivals);
/// Shows the barriers that this thread has made to what copies boxes.
void show_barriers();
void arrive(std::uint64_t* barrier, unsigned bytes);
void wait_for(std::uint64_t* barrier, unsigned parity, int line);

/// Copies a box when nobody can go on without it, and not before. What was there is gone at once.
void copy_box(void* to, const std::uint64_t (&map)[16], int row, int col, std::uint64_t* barrier);

/// Stores sixteen bytes of shared memory. Products see what was there before until this thread shows it.
void store_operand(void* to, const uint4& bytes);
void show_operands();

/// Says what of this thread's registers products will read that come after the fence to come.
void hold(const unsigned* registers, int count);
void begin_products(int line);
/// Multiplies when this warp waits for it, and not before. Until then, sums are not numbers.
void multiply_boxes(float* sums, int count, bool adds, std::uint64_t a, std::uint64_t b, float (*value)(std::uint16_t),
                    int line);
/// The same, with the first operand in registers, which are to stay as they are; the second one lies across.
void multiply_held(float* sums, int count, const unsigned* a, std::uint64_t b, float (*value)(std::uint16_t), int line);
void commit_products(int line);
/// Waits for this warp's products, those of its `latest` groups excepted.
void wait_for_products(unsigned latest, int line);

/// What all lanes of `mask` show.
template <class T>
struct Shown {
    const unsigned char* slots;
    T operator[](unsigned lane) const {
        T value;
        std::memcpy(&value, slots + lane * EXCHANGE, sizeof value);
        return value;
    }
};

template <class T>
Shown<T> exchange(unsigned mask, T mine, int line) {
    static_assert(sizeof(T) <= EXCHANGE && std::is_trivially_copyable<T>::value, "a lane shows little and plain data");
    unsigned char* shown = slots();
    std::memcpy(shown + lane() * EXCHANGE, &mine, sizeof mine);
    meet_warp(mask, line);
    return {shown};
}

/// 'p' pointer, 'i' 32-bit integer, 'f' float, 'm' a tensor's map: what the driver says it passes must be what the
/// kernel takes.
template <class T>
constexpr char kind() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_class<T>::value && sizeof(T) == 128 && alignof(T) == 128) return 'm';
    return std::is_integral<T>::value && sizeof(T) == 4 ? 'i' : '?';
}

/// A kernel by its name. Objects of this type put themselves into a list before `main`.
struct Kernel {
    const char* name;
    void (*run)(const Kernel&, void* const* args);
    void (*function)();
    const char* kinds;
    const Kernel* next;
};

extern const Kernel* kernels;

template <class... A, std::size_t... I>
void call(void (*function)(A...), void* const* args, std::index_sequence<I...>) {
    function(*static_cast<std::remove_reference_t<A>*>(args[I])...);
}

template <class... A>
struct Registered : Kernel {
    static constexpr char KINDS[] = {kind<A>()..., '\0'};

    Registered(const char* name, void (*function)(A...)) {
        this->name = name;
        this->function = reinterpret_cast<void (*)()>(function);
        this->kinds = KINDS;
        this->run = [](const Kernel& self, void* const* args) {
            call(reinterpret_cast<void (*)(A...)>(self.function), args, std::index_sequence_for<A...>{});
        };
        this->next = kernels;
        kernels = this;
    }
};

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float f16_to_float(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
    if (exponent == 31) return of_bits(sign | 0x7f800000u | mantissa << 13);
    if (exponent > 0) return of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    // Half a 2^-23rd: its smallest numbers, exactly.
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

inline std::uint16_t float_to_f16(float x) {
    const std::uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const std::uint16_t sign = bits >> 16 & 0x8000u;
    if (magnitude > 0x7f800000u) return sign | 0x7fffu;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
    // Below 2^-14 adding 1/2 leaves the number in the last bits, rounded to nearest even by the addition.
    if (magnitude < 0x38800000u) {
        return sign | static_cast<std::uint16_t>(bits_of(of_bits(magnitude) + 0.5f) - 0x3f000000u);
    }
    return sign | static_cast<std::uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

inline std::uint16_t float_to_bf16(float x) {
    const std::uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

/// E4M3: to the nearest, ties to even; at most 448.
inline std::uint8_t float_to_f8(float x) {
    const std::uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    const std::uint8_t sign = bits_of(x) >> 24 & 0x80u;
    if (magnitude > 0x7f800000u) return sign | 0x7fu;
    if (magnitude >= bits_of(448.0f)) return sign | 0x7eu;
    // As with halves: below 2^-6 the addition rounds.
    if (magnitude < bits_of(0x1p-6f)) {
        return sign | static_cast<std::uint8_t>(bits_of(of_bits(magnitude) + 0x1p14f) - bits_of(0x1p14f));
    }
    return sign | static_cast<std::uint8_t>((magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1)) >> 20);
}

}  // namespace simt

/// Puts a kernel on the list.
#define REGISTER(name) static const simt::Registered name##_registered(#name, name)

inline void __syncthreads(int line = __builtin_LINE()) { simt::meet_block(line); }

inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
    return simt::meet_block(line, predicate != 0);
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { simt::exchange(mask, 0, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
    const unsigned among = static_cast<unsigned>(width);
    return simt::exchange(mask, value, line)[simt::lane() / among * among + static_cast<unsigned>(source) % among];
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, int line = __builtin_LINE()) {
    return simt::exchange(mask, value, line)[simt::lane() ^ static_cast<unsigned>(bits)];
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int = 32, int line = __builtin_LINE()) {
    auto shown = simt::exchange(mask, value, line);
    return simt::lane() < delta ? value : shown[simt::lane() - delta];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    auto shown = simt::exchange(mask, predicate, line);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < simt::WARP; lane++) {
        if (mask >> lane & 1) bits |= static_cast<unsigned>(shown[lane] != 0) << lane;
    }
    return bits;
}

// Threads take turns only where they meet: nothing can come in between.
template <class T>
T atomicAdd(T* address, T value) {
    T old = *address;
    *address = old + value;
    return old;
}

// A block at a time: what one has written, the others see.
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
    return *from;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return simt::bits_of(x); }
inline float __uint_as_float(unsigned bits) { return simt::of_bits(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline unsigned long long __float2ull_rz(float x) { return static_cast<unsigned long long>(x); }

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
