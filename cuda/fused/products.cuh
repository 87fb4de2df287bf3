// The matrix products of a warp, named as BLAS does: nt for A B^T, nn for A B.
#pragma once

#include "fused/operands.cuh"

namespace cuneigh::fused {

// How many of kSteps small products that are summed over are the terms of one `Terms`.
template <typename Element, int kSteps>
constexpr int kAtOnce = kSteps % Terms<Element>::kMost ? kSteps % 2 ? 1 : 2 : Terms<Element>::kMost;

// product += rows columns^T
//
//   rows     [kRowTiles * 16, kDim]              in shared memory
//   columns  [kColumnTiles * 8, kDim]            in shared memory
//   product  [kRowTiles * 16, kColumnTiles * 8]  in registers
template <int kDim, int kRowTiles, int kColumnTiles, int kRowPitch, int kColumnPitch,
          typename Element>
__device__ void gemm_nt(const Element (*rows_smem)[kRowPitch],
                        const Element (*columns_smem)[kColumnPitch], int lane,
                        float (&product)[kRowTiles][kColumnTiles][4]) {
  constexpr int kSteps = kDim / kDepth<Element>, kTerms = kAtOnce<Element, kSteps>;
  constexpr int kTiles = kColumnTiles % 2 ? 1 : 2;    // loaded at a time
#pragma unroll(kSame<Element, float32> ? 1 : kSteps)  // unrolled, float32 would spill
  for (int first = 0; first < kSteps; first += kTerms) {
    Left<Element> left[kTerms][kRowTiles];
#pragma unroll
    for (int i = 0; i < kTerms; ++i)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        load_left(left[i][m], rows_smem, m * 16, (first + i) * kDepth<Element>, lane);
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += kTiles) {
      Terms<Element> terms[kRowTiles][kTiles];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) {
        Right<Element> right[kTiles];
        load_right(right, columns_smem, n * 8, (first + i) * kDepth<Element>, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            terms[m][tile].add(product[m][n + tile], left[i][m], right[tile]);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) terms[m][tile].finish(product[m][n + tile]);
    }
  }
}

// sum += weights columns
//
//   weights  [kRowTiles * 16, kColumnTiles * 8]  in registers
//   columns  [kColumnTiles * 8, kDim]            in shared memory
//   sum      [kRowTiles * 16, kDim]              in registers
template <int kDim, int kRowTiles, int kColumnTiles, int kPitch, typename Element>
__device__ void gemm_nn(const float (&weight)[kRowTiles][kColumnTiles][4],
                        const Element (*columns_smem)[kPitch], int lane,
                        float (&sum)[kRowTiles][kDim / 8][4]) {
  constexpr int kTiles = kDepth<Element> / 8;
  static_assert(kColumnTiles % kTiles == 0, "the columns of a box make whole operands");
  constexpr int kSteps = kColumnTiles / kTiles, kTerms = kAtOnce<Element, kSteps>;
#pragma unroll
  for (int first = 0; first < kSteps; first += kTerms) {
    Left<Element> left[kTerms][kRowTiles];
#pragma unroll
    for (int i = 0; i < kTerms; ++i)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        left_of_weights(left[i][m], &weight[m][(first + i) * kTiles], lane);
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      Terms<Element> terms[kRowTiles][2];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) {
        Right<Element> right[2];
        load_right_transposed(right, columns_smem, (first + i) * kDepth<Element>, d, lane);
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

}  // namespace cuneigh::fused
