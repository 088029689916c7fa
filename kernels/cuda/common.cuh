// What all kernels share: element types, vectors of eight, and reductions in a fixed order.
//
// Rows of activations are f32, as long as `padded(cols)`, and what pads them is zero: it is allocated zeroed, and no
// kernel writes anything else. So everything can be read eight elements at a time, whatever the number of columns.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
// Kernels are launched by name. nvcc's modules know theirs; the emulation has to be told.
#define REGISTER(name) static_assert(true)
#endif

constexpr int WARP = 32;
/// Words of what is told of a row that was drawn (`sample::Outcome`), the token first.
constexpr int OUTCOME_WORDS = 44;
constexpr unsigned ALL_LANES = ~0u;

/// Waits until the kernel before this one has ended, and what it wrote is there; then the one after this may start.
/// Every thread of every kernel calls this, once, and before it does touches nothing but what no kernel writes:
/// weights, and the step's plan, whose copy to the device all kernels of the step come after.
///
/// From compute capability 9.0 on, kernels are launched such that they start while the one before still runs
/// (programmatic dependent launch), so that their blocks are there, and the first weights on their way, when it ends.
/// As the next one may start only then, no more than two ever run side by side, and whatever ran before the one before
/// has ended.
__device__ __forceinline__ void follow() {
#if !defined(__CUDACC__)
    simt::follow();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// A word of the step's plan, as it may be read before `follow`: past the L1 cache. Each step's plan lies where the one
/// before did, and that no old copy of it is left there is promised only to what is read after `follow`. The L2 cache
/// has what was copied to the device last.
__device__ __forceinline__ int planned_word(const int* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    // Where kernels do not start early.
    return *from;
#else
    return __ldcg(from);
#endif
}

/// Columns of a row as it lies in memory.
__device__ __forceinline__ int padded(int cols) { return (cols + 7) / 8 * 8; }

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / WARP; }

/// IEEE half precision and bfloat16, as bits.
struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};
/// E4M3: KvDType::F8 of src/kv.rs.
struct F8 {
    uint8_t bits;
};

#ifdef __CUDACC__
__device__ __forceinline__ float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ F16 to_f16(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
__device__ __forceinline__ BF16 to_bf16(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
__device__ __forceinline__ F8 to_f8(float x) {
    return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}
/// Two f16, 256 times each.
__device__ __forceinline__ unsigned times_256(unsigned halves) {
    unsigned products;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(products) : "r"(halves), "r"(0x5c005c00u));
    return products;
}
#else
inline float to_float(F16 x) { return simt::f16_to_float(x.bits); }
inline F16 to_f16(float x) { return {simt::float_to_f16(x)}; }
inline BF16 to_bf16(float x) { return {simt::float_to_bf16(x)}; }
inline F8 to_f8(float x) { return {simt::float_to_f8(x)}; }
inline unsigned times_256(unsigned halves) {
    const auto product = [](unsigned half) -> unsigned {
        return simt::float_to_f16(256.0f * simt::f16_to_float(half));
    };
    return product(halves & 0xffffu) | product(halves >> 16) << 16;
}
#endif
__device__ __forceinline__ float to_float(BF16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

/// E4M3 in the upper bytes of a word's halves, as f16 that are 256 times too small: bits of exponent and mantissa mean
/// the same but for the exponent's bias. One that is NaN becomes a number.
__device__ __forceinline__ unsigned small_halves(unsigned f8s) {
    return (f8s & 0x80008000u) | (f8s >> 1 & 0x3f803f80u);
}

/// Two E4M3 as f16, which has all of them: the first in the lower half, each way.
__device__ __forceinline__ unsigned halves_of(uint16_t f8s) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const __half2_raw both = __nv_cvt_fp8x2_to_halfraw2(f8s, __NV_E4M3);
    return both.x | static_cast<unsigned>(both.y) << 16;
#else
    // Where that is no instruction, it is branches and a loop for each. Multiplied like this, none is rounded, however
    // small. Of what was NaN and is 480 now, one bit of the exponent is not set.
    const unsigned upper = (f8s & 0xff00u) << 16 | (f8s & 0xffu) << 8;
    const unsigned are_nan = ((upper & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
    return times_256(small_halves(upper)) | are_nan >> 2;
#endif
}

__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(F16* to, float x) { *to = to_f16(x); }
__device__ __forceinline__ void store(BF16* to, float x) { *to = to_bf16(x); }
__device__ __forceinline__ void store(F8* to, float x) { *to = to_f8(x); }

/// Eight consecutive elements, from an address that is a multiple of their size.
__device__ __forceinline__ void load8(const float* from, float (&to)[8]) {
    float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 4);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

template <class T> // F16 or BF16
__device__ __forceinline__ void load8(const T* from, float (&to)[8]) {
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
        to[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
}

/// The sum over a warp, the same in all lanes: sums of two commute, so each lane adds up the same numbers in pairs.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
    return x;
}

/// Sums over each LANES lanes side by side, of N values at a time: each exchange halves what a lane still adds up, so
/// that N sums take about N exchanges and not 5 N. Lane l of the LANES ends with sums `l * N / LANES ..` in the first
/// places: one of them, which its neighbours have too, where N is less than LANES. Each is added up as by `warp_sum`.
template <int N, int LANES>
__device__ __forceinline__ void transposed_sum(float (&values)[N]) {
    int left = N;
#pragma unroll
    for (int bits = LANES / 2; bits > 0; bits /= 2) {
        if (left > 1) {
            const bool upper = lane_id() & bits;
            left /= 2;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                if (i < left) {
                    const float low = values[i], high = values[left + i];
                    values[i] = (upper ? high : low) + __shfl_xor_sync(ALL_LANES, upper ? low : high, bits);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(ALL_LANES, values[0], bits);
        }
    }
}

template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
    for (int bits = WARP / 2; bits > 0; bits /= 2) {
        T other = __shfl_xor_sync(ALL_LANES, x, bits);
        x = other > x ? other : x;
    }
    return x;
}

/// The sum over a block of WARPS warps, the same in all threads: within warps, then over them in order.
template <int WARPS, class T>
__device__ __forceinline__ T block_sum(T x) {
    __shared__ T sums[WARPS];
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) sums[warp_id()] = x;
    __syncthreads();
    T sum = sums[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) sum += sums[i];
    return sum;
}

template <int WARPS, class T>
__device__ __forceinline__ T block_max(T x) {
    __shared__ T highest[WARPS];
    x = warp_max(x);
    __syncthreads();
    if (lane_id() == 0) highest[warp_id()] = x;
    __syncthreads();
    T best = highest[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) best = highest[i] > best ? highest[i] : best;
    return best;
}

/// What RMS norm multiplies a row by, before its weights (Zhang and Sennrich 2019), the same in all threads of a block.
/// Thread t adds up the squares of elements t, t + 32 WARPS, ...
template <int WARPS>
__device__ __forceinline__ float rms_scale(const float* x, int cols, float eps) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < cols; i += WARPS * WARP) squares = fmaf(x[i], x[i], squares);
    return 1.0f / sqrtf(block_sum<WARPS>(squares) / static_cast<float>(cols) + eps);
}

/// The gated activation.
__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }
