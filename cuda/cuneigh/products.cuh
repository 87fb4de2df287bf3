// The matrix products of a warp: of its rows with a box of columns, and of weights with such a box.
#pragma once

#include "cuneigh/operands.cuh"

namespace cuneigh {

// product += rows columns^T
template <int kDim, int kRowTiles, int kColumnTiles, int kRowPitch, int kColumnPitch,
          typename Element>
__device__ void multiply(const Element (*rows_smem)[kRowPitch],
                         const Element (*columns_smem)[kColumnPitch], int lane,
                         float (&product)[kRowTiles][kColumnTiles][4]) {
  constexpr int kTiles = kColumnTiles % 2 ? 1 : 2;  // loaded at a time
#pragma unroll(kSame<Element, float32> ? 2 : 16)
  for (int d = 0; d < kDim; d += kDepth<Element>) {
    Left<Element> left[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) take_rows(left[m], &rows_smem[m * 16], d, lane);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += kTiles) {
      Right<Element> right[kTiles];
      take_columns(right, &columns_smem[n * 8], d, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Terms<Element> terms;
          terms.add(product[m][n + tile], left[m], right[tile]);
          terms.finish(product[m][n + tile]);
        }
    }
  }
}

// sum += weights columns
template <int kDim, int kRowTiles, int kColumnTiles, int kPitch, typename Element>
__device__ void accumulate(const float (&weight)[kRowTiles][kColumnTiles][4],
                           const Element (*columns_smem)[kPitch], int lane,
                           float (&sum)[kRowTiles][kDim / 8][4]) {
  constexpr int kTiles = kDepth<Element> / 8;
  static_assert(kColumnTiles % kTiles == 0, "the columns of a box make whole operands");
  constexpr int kSteps = kColumnTiles / kTiles;
  constexpr int kMost = Terms<Element>::kMost, kAtOnce = kMost < kSteps ? kMost : kSteps;
  static_assert(kSteps % kAtOnce == 0, "all sums have as many terms");
#pragma unroll
  for (int first = 0; first < kSteps; first += kAtOnce) {
    Left<Element> left[kAtOnce][kRowTiles];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        take_weights(left[i][m], &weight[m][(first + i) * kTiles], lane);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      Terms<Element> terms[kRowTiles][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Right<Element> right[2];
        take_dimensions(right, &columns_smem[(first + i) * kDepth<Element>], d, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int tile = 0; tile < 2; ++tile)
            terms[m][tile].add(sum[m][d / 8 + tile], left[i][m], right[tile]);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) terms[m][tile].finish(sum[m][d / 8 + tile]);
    }
  }
}

}  // namespace cuneigh
