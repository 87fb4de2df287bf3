// What sixteen columns add to the gradients of a warp's sixteen rows.
#pragma once

#include "fused/small/products.cuh"
#include "fused/small/tiles.cuh"

namespace cuneigh::fused::small {

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
