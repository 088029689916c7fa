// Weights, keys and values as decoding reads them: once, so past the L1 cache, and in two steps, so that many loads are
// under way before the first is used.
#pragma once

#include "weights.cuh"

/// Words that are read once in a kernel, and not written by it or not used as they were loaded: they pass by the L1
/// cache, and leave it to what is read again. Not as data that nobody writes at all (`ld.global.nc`), which on sm_90
/// ptxas moves across `follow`, in both directions: weights would be asked for too late, and keys too early.
__device__ __forceinline__ uint4 stream16(const void* from) {
#ifdef __CUDACC__
    uint4 to;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(__cvta_generic_to_global(from)));
    return to;
#else
    return *static_cast<const uint4*>(from);
#endif
}

__device__ __forceinline__ uint2 stream8(const void* from) {
#ifdef __CUDACC__
    uint2 to;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to.x), "=r"(to.y)
                 : "l"(__cvta_generic_to_global(from)));
    return to;
#else
    return *static_cast<const uint2*>(from);
#endif
}

__device__ __forceinline__ unsigned stream4(const void* from) {
#ifdef __CUDACC__
    unsigned to;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(to) : "l"(__cvta_generic_to_global(from)));
    return to;
#else
    return *static_cast<const unsigned*>(from);
#endif
}

/// Zero, for words that seldom are to be: the compiler jumps over it, and does not choose between two for each.
__device__ __forceinline__ void clear(unsigned& word) {
#ifdef __CUDACC__
    asm volatile("mov.u32 %0, 0;" : "=r"(word));
#else
    word = 0;
#endif
}

/// Words of shared memory in place of others, if that is wanted: in the registers where those are, one by one. (The
/// compiler would make one store of several that exclude each other, and keep the registers in memory for it.)
__device__ __forceinline__ void replace(uint4& words, const void* shared, bool wanted) {
#ifdef __CUDACC__
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p ld.shared.v4.u32 {%0, %1, %2, %3}, [%5]; }"
                 : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
                 : "r"(static_cast<unsigned>(wanted)), "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared)))
                 : "memory");
#else
    if (wanted) words = *static_cast<const uint4*>(shared);
#endif
}

__device__ __forceinline__ void replace(uint2& words, const void* shared, bool wanted) {
#ifdef __CUDACC__
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.shared.v2.u32 {%0, %1}, [%3]; }"
                 : "+r"(words.x), "+r"(words.y)
                 : "r"(static_cast<unsigned>(wanted)), "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared)))
                 : "memory");
#else
    if (wanted) words = *static_cast<const uint2*>(shared);
#endif
}

/// Half of eight elements whose bits are in `raw`, 16 bytes (F16 or BF16) or 32 (float).
__device__ __forceinline__ void four_of(const uint4 (&raw)[2], int half, float (&to)[4], float) {
    const uint4 bits = raw[half];
    to[0] = __uint_as_float(bits.x), to[1] = __uint_as_float(bits.y);
    to[2] = __uint_as_float(bits.z), to[3] = __uint_as_float(bits.w);
}

template <class T>
__device__ __forceinline__ void four_of(const uint4 (&raw)[1], int half, float (&to)[4], T) {
    const unsigned low = half ? raw[0].z : raw[0].x, high = half ? raw[0].w : raw[0].y;
    to[0] = to_float(T{static_cast<uint16_t>(low)}), to[1] = to_float(T{static_cast<uint16_t>(low >> 16)});
    to[2] = to_float(T{static_cast<uint16_t>(high)}), to[3] = to_float(T{static_cast<uint16_t>(high >> 16)});
}

/// What a matrix's eight elements are before they are numbers, and how they become them: the same as by its `load`.
template <class Matrix>
struct Streamed;

template <class T>
struct Streamed<Floats<T>> {
    struct Raw {
        uint4 bits[sizeof(T) / 2];
    };
    /// Elements `at ..` of a row that starts with element `start` of the matrix; `at` is a multiple of eight.
    __device__ __forceinline__ static Raw fetch(const Floats<T>& matrix, size_t start, int at) {
        Raw raw;
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) {
            raw.bits[i] = stream16(reinterpret_cast<const uint4*>(matrix.values + start + at) + i);
        }
        return raw;
    }
    __device__ __forceinline__ static void clear(Raw& raw) {
#pragma unroll
        for (uint4& bits : raw.bits) ::clear(bits.x), ::clear(bits.y), ::clear(bits.z), ::clear(bits.w);
    }
    /// Eight elements of shared memory in its place, if that is wanted.
    __device__ __forceinline__ static void replace(Raw& raw, const T* shared, bool wanted) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T) / 2); i++) {
            ::replace(raw.bits[i], reinterpret_cast<const uint4*>(shared) + i, wanted);
        }
    }
    /// The first or second half of them.
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        four_of(raw.bits, half, to, T());
    }
};

template <>
struct Streamed<Floats<F8>> {
    struct Raw {
        uint2 bits;
    };
    __device__ __forceinline__ static Raw fetch(const Floats<F8>& matrix, size_t start, int at) {
        return {stream8(matrix.values + start + at)};
    }
    __device__ __forceinline__ static void clear(Raw& raw) { ::clear(raw.bits.x), ::clear(raw.bits.y); }
    __device__ __forceinline__ static void replace(Raw& raw, const F8* shared, bool wanted) {
        ::replace(raw.bits, shared, wanted);
    }
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        const unsigned four = half ? raw.bits.y : raw.bits.x;
        const unsigned low = halves_of(static_cast<uint16_t>(four)), high = halves_of(four >> 16);
        to[0] = to_float(F16{static_cast<uint16_t>(low)}), to[1] = to_float(F16{static_cast<uint16_t>(low >> 16)});
        to[2] = to_float(F16{static_cast<uint16_t>(high)}), to[3] = to_float(F16{static_cast<uint16_t>(high >> 16)});
    }
};

/// The halves of a word, an f16 each.
__device__ __forceinline__ float scale_of(unsigned pair) { return to_float(F16{static_cast<uint16_t>(pair)}); }
__device__ __forceinline__ float minimum_of(unsigned pair) { return to_float(F16{static_cast<uint16_t>(pair >> 16)}); }

/// Small numbers become floats without a conversion: as the last bits of 2^23, they are so much more than 2^23.
constexpr unsigned UNIT_BITS = 0x4b000000;
constexpr float UNIT = 8388608.0f;

template <>
struct Streamed<Nibbles> {
    struct Raw {
        unsigned quants, scales;
    };
    __device__ __forceinline__ static Raw fetch(const Nibbles& matrix, size_t start, int at) {
        return {stream4(matrix.quants + (start + at) / 8), stream4(matrix.scales + (start + at) / 32)};
    }
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        const float scale = scale_of(raw.scales), minimum = minimum_of(raw.scales);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float quant = __uint_as_float((raw.quants >> (16 * half + 4 * i) & 15) | UNIT_BITS) - UNIT;
            to[i] = fmaf(quant, scale, minimum);
        }
    }
};

template <>
struct Streamed<ScaledF8> {
    struct Raw {
        uint2 quants;
        float scale;
    };
    __device__ __forceinline__ static Raw fetch(const ScaledF8& matrix, size_t start, int at) {
        return {stream8(matrix.quants + (start + at) / 8), matrix.scales[(start + at) / 128]};
    }
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        small_f8(half ? raw.quants.y : raw.quants.x, to[0], to[1], to[2], to[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] *= raw.scale;
    }
};

struct RawBytes {
    unsigned first, second, scales;

    __device__ __forceinline__ RawBytes() {}
    __device__ __forceinline__ RawBytes(uint2 quants, unsigned scales)
        : first(quants.x), second(quants.y), scales(scales) {}

    __device__ __forceinline__ void unpack(int half, float (&to)[4]) const {
        // As unsigned bytes, 128 more.
        const unsigned words = (half ? second : first) ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = __uint_as_float((words >> 8 * i & 255) | UNIT_BITS) - (UNIT + 128.0f);
    }
};

template <>
struct Streamed<Bytes> {
    using Raw = RawBytes;
    __device__ __forceinline__ static Raw fetch(const Bytes& matrix, size_t start, int at) {
        return {stream8(matrix.quants + (start + at) / 8), matrix.scales[(start + at) / 32].bits};
    }
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        raw.unpack(half, to);
        const float scale = scale_of(raw.scales);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] *= scale;
    }
};

template <>
struct Streamed<FineBytes> {
    using Raw = RawBytes;
    __device__ __forceinline__ static Raw fetch(const FineBytes& matrix, size_t start, int at) {
        return {stream8(matrix.quants + (start + at) / 8), stream4(matrix.scales + (start + at) / 16)};
    }
    __device__ __forceinline__ static void unpack(const Raw& raw, int half, float (&to)[4]) {
        raw.unpack(half, to);
        const float scale = scale_of(raw.scales), minimum = minimum_of(raw.scales);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = fmaf(to[i], scale, minimum);
    }
};
