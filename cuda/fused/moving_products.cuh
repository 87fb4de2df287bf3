// The products of products.cuh together with their tangents, for which each operand is loaded once.
#pragma once

#include "fused/products.cuh"

namespace cuneigh::fused {

// product += rows columns^T,  d_product += d_rows columns^T + rows d_columns^T
//
// Shapes are those of gemm_nt. kRowsMove and kColumnsMove say whether there are d_rows and
// d_columns.
template <int kDim, bool kRowsMove = true, bool kColumnsMove = true, int kRowTiles,
          int kColumnTiles, int kRowPitch, int kColumnPitch, typename Element>
__device__ void moving_gemm_nt(const Element (*rows_smem)[kRowPitch],
                               const Element (*d_rows_smem)[kRowPitch],
                               const Element (*columns_smem)[kColumnPitch],
                               const Element (*d_columns_smem)[kColumnPitch], int lane,
                               float (&product)[kRowTiles][kColumnTiles][4],
                               float (&d_product)[kRowTiles][kColumnTiles][4]) {
  if constexpr (kSame<Element, float32>) {  // both at once would not fit into registers
    gemm_nt<kDim>(rows_smem, columns_smem, lane, product);
    if constexpr (kRowsMove) gemm_nt<kDim>(d_rows_smem, columns_smem, lane, d_product);
    if constexpr (kColumnsMove) gemm_nt<kDim>(rows_smem, d_columns_smem, lane, d_product);
  } else {
    constexpr int kTiles = kColumnTiles % 2 ? 1 : 2;  // loaded at a time
#pragma unroll
    for (int d = 0; d < kDim; d += kDepth<Element>) {
      Left<Element> left[kRowTiles], d_left[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_left(left[m], rows_smem, m * 16, d, lane);
        if constexpr (kRowsMove) load_left(d_left[m], d_rows_smem, m * 16, d, lane);
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += kTiles) {
        Right<Element> right[kTiles], d_right[kTiles];
        load_right(right, columns_smem, n * 8, d, lane);
        if constexpr (kColumnsMove) load_right(d_right, d_columns_smem, n * 8, d, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            Terms<Element> terms;
            terms.add(product[m][n + tile], left[m], right[tile]);
            if constexpr (kRowsMove) terms.add(d_product[m][n + tile], d_left[m], right[tile]);
            if constexpr (kColumnsMove) terms.add(d_product[m][n + tile], left[m], d_right[tile]);
          }
      }
    }
  }
}

// sum += weights columns,  d_sum += d_weights columns + weights d_columns
//
// Shapes are those of gemm_nn.
template <int kDim, int kRowTiles, int kColumnTiles, int kPitch, typename Element>
__device__ void moving_gemm_nn(const float (&weight)[kRowTiles][kColumnTiles][4],
                               const float (&d_weight)[kRowTiles][kColumnTiles][4],
                               const Element (*columns_smem)[kPitch],
                               const Element (*d_columns_smem)[kPitch], int lane,
                               float (&sum)[kRowTiles][kDim / 8][4],
                               float (&d_sum)[kRowTiles][kDim / 8][4]) {
  if constexpr (kSame<Element, float32>) {
    gemm_nn<kDim>(weight, columns_smem, lane, sum);
    gemm_nn<kDim>(weight, d_columns_smem, lane, d_sum);
    gemm_nn<kDim>(d_weight, columns_smem, lane, d_sum);
  } else {
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      Left<Element> left[kRowTiles], d_left[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        left_of_weights(left[m], &weight[m][n], lane);
        left_of_weights(d_left[m], &d_weight[m][n], lane);
      }
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        Right<Element> right[2], d_right[2];
        load_right_transposed(right, columns_smem, n * 8, d, lane);
        load_right_transposed(d_right, d_columns_smem, n * 8, d, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            Terms<Element> terms;
            terms.add(sum[m][d / 8 + tile], left[m], right[tile]);
            terms.add(d_sum[m][d / 8 + tile], d_left[m], right[tile]);
            terms.add(d_sum[m][d / 8 + tile], left[m], d_right[tile]);
          }
      }
    }
  }
}

}  // namespace cuneigh::fused
