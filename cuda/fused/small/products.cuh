// Products of a warp's sixteen rows and sixteen columns, with and without their tangents.
#pragma once

#include "fused/mma.cuh"

namespace cuneigh::fused::small {

// product = rows columns^T, with rows [16, kDim] and sixteen columns [16, kDim].
// row_operand(d, operand) makes the left operand of dimensions d to d + 15. address(d) is that of
// dimension d + lane / 8 % 2 * 8 of column lane / 16 * 8 + lane % 8.
template <int kDim, typename RowOperand, typename Address, typename Element>
__device__ void gemm_nt_16(RowOperand row_operand, Address address, float (&product)[2][4],
                           Element) {
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned row[4], columns[4];
    row_operand(d, row);
    ldmatrix_x4(columns, address(d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (d == 0)
        mma_m16n8k16_zero(product[i], row, columns[2 * i], columns[2 * i + 1], Element());
      else
        mma_m16n8k16(product[i], row, columns[2 * i], columns[2 * i + 1], Element());
    }
  }
}

// sum += weights columns, with weights [16, 16], sixteen columns [16, kDim] and sum [16, kDim].
// address(d) is that of dimension d + lane / 16 * 8 of column lane % 16.
template <int kDim, typename Address, typename Element>
__device__ void gemm_nn_16(const float (&weight)[2][4], Address address, float (&sum)[kDim / 8][4],
                           Element) {
  unsigned weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    weights[i] = pack(weight[i / 2][i % 2 * 2], weight[i / 2][i % 2 * 2 + 1], Element());
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned columns[4];
    ldmatrix_x4_trans(columns, address(d));
    mma_m16n8k16(sum[d / 8], weights, columns[0], columns[1], Element());
    mma_m16n8k16(sum[d / 8 + 1], weights, columns[2], columns[3], Element());
  }
}

// Likewise, together with d_product = d_rows columns^T + rows d_columns^T. `d_row_operand` makes
// the left operands of d_rows, and d_columns lie `to_tangents` bytes from the columns. kRowsMove
// and kColumnsMove say whether there are d_rows and d_columns.
template <int kDim, bool kRowsMove, bool kColumnsMove, typename RowOperand, typename MovingOperand,
          typename Address, typename Element>
__device__ void moving_gemm_nt_16(RowOperand row_operand, MovingOperand d_row_operand,
                                  Address address, unsigned to_tangents, float (&product)[2][4],
                                  float (&d_product)[2][4], Element) {
  static_assert(kRowsMove || kColumnsMove);
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned row[4], d_row[4], columns[4], d_columns[4];
    row_operand(d, row);
    ldmatrix_x4(columns, address(d));
    if constexpr (kRowsMove) d_row_operand(d, d_row);
    if constexpr (kColumnsMove) ldmatrix_x4(d_columns, address(d) + to_tangents);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto multiply = [&](bool is_first, float (&sum)[4], const unsigned (&left)[4],
                                const unsigned (&right)[4]) {
        if (is_first)
          mma_m16n8k16_zero(sum, left, right[2 * i], right[2 * i + 1], Element());
        else
          mma_m16n8k16(sum, left, right[2 * i], right[2 * i + 1], Element());
      };
      multiply(d == 0, product[i], row, columns);
      if constexpr (kRowsMove) multiply(d == 0, d_product[i], d_row, columns);
      if constexpr (kColumnsMove) multiply(d == 0 && !kRowsMove, d_product[i], row, d_columns);
    }
  }
}

}  // namespace cuneigh::fused::small
