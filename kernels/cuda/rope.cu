// Norms and rotates queries and keys, and stores keys and values in their pages. Steps that only decode have attention
// do so (attention.cu).

#include "pages.cuh"
#include "rotation.cuh"

namespace rope {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;

/// A warp takes a head of a row: query heads stay in place, key and value heads go to the cache.
template <class T>
__device__ __forceinline__ void rope_and_cache(float* qkv, Rows rows, const Rotation& rotation, Pages<T> pages,
                                               int heads) {
    __shared__ float vectors[WARPS][HEAD_DIM_MAX];
    const int row = blockIdx.x, head = blockIdx.y * WARPS + warp_id();
    const int kv_heads = pages.kv_heads, head_dim = pages.head_dim, position = rows.position(row);
    const int* const table = rows.table(row);
    follow();
    if (position < 0 || head >= heads + 2 * kv_heads) return;
    float* x = qkv + static_cast<size_t>(row) * padded((heads + 2 * kv_heads) * head_dim) + head * head_dim;
    float* vector = vectors[warp_id()];
    if (head < heads) {
        rotation.turn<HEAD_DIM_MAX>(x, rotation.q_norm, position, head_dim, vector,
                                    [&](int i, float value) { x[i] = value; });
    } else if (head < heads + kv_heads) {
        T* const key = pages.key(table, position, head - heads);
        rotation.turn<HEAD_DIM_MAX>(x, rotation.k_norm, position, head_dim, vector,
                                    [&](int i, float value) { store(key + i, value); });
    } else {
        T* const value = pages.value(table, position, head - heads - kv_heads);
        for (int i = lane_id(); i < head_dim; i += WARP) store(value + i, x[i]);
    }
}

}  // namespace rope

// rope_and_cache_{type of the cache}: norms the query and key heads of each row (if q_norm and k_norm are given),
// rotates them to the row's position, writes queries back and keys and values into the row's page.
// qkv: [rows, (heads + 2 kv_heads) * head_dim]; cos, sin: [positions, pairs]; norms: [head_dim].
// Grid: (rows, heads of all kinds / 4). Bytes: 4 a value read, 4 a query value and an element of the cache a key and
// value element written. Operations: 6 a value. A row's result depends on that row alone.
#define ROPE_AND_CACHE(SUFFIX, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(rope::THREADS) rope_and_cache_##SUFFIX(                               \
        float* qkv, const int* positions, const int* table_starts, const int* block_tables, const float* cos,          \
        const float* sin, int pairs, const float* q_norm, const float* k_norm, float eps, void* pages, int heads,      \
        int kv_heads, int head_dim, int block_size) {                                                                  \
        rope::rope_and_cache(qkv, Rows{positions, table_starts, block_tables},                                         \
                             Rotation{cos, sin, pairs, q_norm, k_norm, eps},                                           \
                             Pages<T>{static_cast<T*>(pages), kv_heads, head_dim, block_size}, heads);                 \
    }                                                                                                                  \
    REGISTER(rope_and_cache_##SUFFIX)

ROPE_AND_CACHE(f32, float);
ROPE_AND_CACHE(f16, F16);
ROPE_AND_CACHE(bf16, BF16);
ROPE_AND_CACHE(f8, F8);
