// The relative positional bias of a box of columns.
#pragma once

#include "cuneigh/types.cuh"
#include "fused/masks.cuh"

namespace cuneigh::fused {

// logit = scale * logit + log2(e) * rpb for one of a lane's rows; base 2, as all logits here.
// `half` says which of the lane's two rows of sixteen it is.
template <typename Plan>
__device__ void add_bias(const View<const typename Plan::Bias, Plan::kRank>& rpb,
                         const ColumnBox<Plan>& columns, const Tables<Plan>& tables, int row,
                         int half, int lane, float scale, const LaneMask<Plan::kColumns>& visible,
                         float (&logit)[Plan::kColumns / 8][4]) {
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;
  long long origin = tables.bias_offset[row];
  if (!Plan::kAdditional || !columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) origin += kSign * columns.begin[r] * rpb.token[r];
  }
  const auto* bias = rpb.at(0, columns.head) + origin;
  constexpr bool kLong = Plan::kHeadDim + Plan::kValueDim > 256;
#pragma unroll
  for (int n = 0; n < Plan::kColumns / 8; ++n) {
    if constexpr (kLong) {
      // A branch, without which all loads would be on their way at once and take registers for it
      if (!__any_sync(0xffffffffu, visible(n * 8) || visible(n * 8 + 1))) {
        logit[n][2 * half] *= scale;
        logit[n][2 * half + 1] *= scale;
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = logit[n][2 * half + i];
      x *= scale;
      if ((!Plan::kAdditional || !columns.additional) && visible(n * 8 + i))
        x += kLog2E * convert<float>(bias[tables.scalar_offset[n * 8 + i + lane % 4 * 2].bias]);
    }
  }
}

}  // namespace cuneigh::fused
