// What the products on tensor cores of gemm.cu and hopper_gemm.cu have in common: where a block's tile lies, and where
// the sums of a row are cut, which is what their bits depend on.
#pragma once

#include "common.cuh"

/// Input features that are added up by themselves. src/cuda/gemm.rs knows it too.
constexpr int SEGMENT = 512;

/// Tiles of rows that go through the features side by side, so that weights are fetched once for all of them.
constexpr int ROW_TILES = 16;

/// Where a block's tile begins. Tiles that follow each other are of the same features: up to ROW_TILES of them.
struct Place {
    int row, feature;

    template <class Tile>
    static __device__ __forceinline__ Place of(int rows, int features) {
        const int down = (rows + Tile::ROWS - 1) / Tile::ROWS, across = (features + Tile::OUT - 1) / Tile::OUT;
        const int tile = static_cast<int>(blockIdx.x), first = tile / (ROW_TILES * across) * ROW_TILES;
        const int rest = tile - first * across, side_by_side = min(ROW_TILES, down - first);
        return {(first + rest % side_by_side) * Tile::ROWS, rest / side_by_side * Tile::OUT};
    }
};
