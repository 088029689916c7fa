// Where a token's keys and values lie: `[page][kv_head][K or V][token][head_dim]`, one region a layer.
#pragma once

#include "common.cuh"

/// Widest heads there are.
constexpr int HEAD_DIM_MAX = 256;

/// The rows of a step. Rows that only fill up a step to the size it was recorded at have position -1.
struct Rows {
    /// Position of each row's token in its sequence.
    const int* positions;
    /// Where in `block_tables` the table of its sequence starts.
    const int* table_starts;
    const int* block_tables;

    __device__ __forceinline__ int position(int row) const { return planned_word(positions + row); }
    /// The block table of a row's sequence.
    __device__ __forceinline__ const int* table(int row) const {
        return block_tables + planned_word(table_starts + row);
    }
};

/// The pages of one layer.
template <class T>
struct Pages {
    T* base;
    int kv_heads, head_dim, block_size;

    /// Where the key of a head starts at `position` of the sequence with this block table.
    __device__ __forceinline__ T* key(const int* table, int position, int head) const {
        const size_t page = table[position / block_size];
        return base + ((page * kv_heads + head) * 2 * block_size + position % block_size) * head_dim;
    }

    /// Where the value does.
    __device__ __forceinline__ T* value(const int* table, int position, int head) const {
        return key(table, position, head) + static_cast<size_t>(block_size) * head_dim;
    }
};
