// Which columns of a box a row meets, and the relative positional bias of those.
#pragma once

#include "fused/fused.cuh"

namespace cuneigh::fused {

// Notes the columns that each of a warp's rows meets: a lane takes a row.
template <typename Plan>
__device__ void note_visible(const FusedProblem<Plan::kRank>& problem,
                             const ColumnBox<Plan>& columns, Tables<Plan>& tables, int warp,
                             int lane) {
  constexpr int kRows = Plan::kRowTiles * 16;
  static_assert(kRows <= 32, "one row a lane");
  const int row = warp * kRows + lane % kRows;
  unsigned long long visible = columns.exists;
  if (!Plan::kAdditional || !columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Range window = tables.window[row][r];
      const int size = problem.column_box[r];
      const int begin = smaller(larger(window.begin - columns.begin[r], 0), size);
      const int end = smaller(larger(window.end - columns.begin[r], 0), size);
      visible &= tables.before[r][end] & ~tables.before[r][begin];
    }
  }
  __syncwarp();
  tables.visible[row] = visible;
  __syncwarp();
}

// A row's columns as bits, those that a lane has.
template <int kColumns>
struct Visible {
  unsigned word[(kColumns + 31) / 32];
  __device__ bool operator()(int column) const { return word[column / 32] >> column % 32 & 1; }
  __device__ static Visible all() {
    Visible visible;
#pragma unroll
    for (unsigned& word : visible.word) word = ~0u;
    return visible;
  }
  __device__ Visible(unsigned long long bits, int lane) {
#pragma unroll
    for (int i = 0; i < (kColumns + 31) / 32; ++i)
      word[i] = unsigned(bits >> 32 * i) >> lane % 4 * 2;
  }
  __device__ Visible() {}
};

// Scales a row's logits to base 2 and adds the bias.
template <typename Plan>
__device__ void add_bias(const View<const typename Plan::Bias, Plan::kRank>& rpb,
                         const ColumnBox<Plan>& columns, const Tables<Plan>& tables, int row,
                         int half, int lane, float scale, const Visible<Plan::kColumns>& visible,
                         float (&logit)[Plan::kColumns / 8][4]) {
  constexpr float kLog2E = 1.44269504f;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;
  long long origin = tables.bias[row];
  if (!Plan::kAdditional || !columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) origin += kSign * columns.begin[r] * rpb.token[r];
  }
  const auto* entry = rpb.at(0, columns.head) + origin;
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
        x += kLog2E * convert<float>(entry[tables.scalar_steps[n * 8 + i + lane % 4 * 2].bias]);
    }
  }
}

}  // namespace cuneigh::fused
