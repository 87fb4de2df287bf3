// What sixteen columns add to the gradients of a warp's sixteen rows.
#pragma once

#include "fused/small/tiles.cuh"

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

// {lse * log2(e), delta} of the queries of a product with eight columns that a lane has a part of:
// of its two rows or, if rows are keys, of its two columns.
struct PairStatistics {
  float2 of[2];
};

// Adds dS column_qk to grad_qk and, if rows are keys, P column_vo to grad_v, for columns n to n +
// 15 of a tile. row_qk and row_vo make the left operands of `gemm_nt_16`. Of the lane's columns
// those are visible whose bits from number `bit` on are set in `visible`. statistics_of(n) are
// those of the product with columns n to n + 7.
template <typename Plan, typename Tile, typename RowQk, typename RowVo, typename StatisticsOf>
__device__ void add_columns(const SmallWindowProblem<Plan::kRank>& problem, const Tile& tile, int n,
                            RowQk row_qk, RowVo row_vo, float scale, const LaneMasks<Plan>& visible,
                            int bit, StatisticsOf statistics_of,
                            float (&grad_qk)[Plan::kHeadDim / 8][4],
                            float (&grad_v)[Plan::kValueDim / 8][4]) {
  using Element = typename Plan::Element;
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  // S = row_qk column_qk^T and dP = row_vo column_vo^T, [16, 16]
  const unsigned nt = tile.nt(n);
  const auto qk_nt = [&](int d) { return chunk_address<Plan>(problem, nt, d / 8); };
  const auto vo_nt = [&](int d) { return chunk_address<Plan>(problem, nt, (kHeadDim + d) / 8); };
  float weight[2][4], grad_weight[2][4];
  gemm_nt_16<kHeadDim>(row_qk, qk_nt, weight, Element());
  gemm_nt_16<kValueDim>(row_vo, vo_nt, grad_weight, Element());

  // P = exp(scale * S - lse) and dS = P * (dP - delta). What is hidden stays 0 whatever it is
  // multiplied with
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const PairStatistics statistics = statistics_of(n + t * 8);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto [lse, delta] = statistics.of[Plan::kRowsAreKeys ? i % 2 : i / 2];
      const bool sees = visible.row[i / 2] >> (bit + t * 2 + i % 2) & 1;
      const float p = sees ? ex2_approx(fmaf(weight[t][i], scale, -lse)) : 0.0f;
      const float ds = sees ? p * (grad_weight[t][i] - delta) : 0.0f;
      weight[t][i] = p;
      grad_weight[t][i] = ds;
    }
  }

  // grad_v += P column_vo and grad_qk += dS column_qk
  const unsigned nn = tile.nn(n);
  const auto qk_nn = [&](int d) { return chunk_address<Plan>(problem, nn, d / 8); };
  const auto vo_nn = [&](int d) { return chunk_address<Plan>(problem, nn, (kHeadDim + d) / 8); };
  if constexpr (Plan::kRowsAreKeys) gemm_nn_16<kValueDim>(weight, vo_nn, grad_v, Element());
  gemm_nn_16<kHeadDim>(grad_weight, qk_nn, grad_qk, Element());
}

}  // namespace cuneigh::fused::small
