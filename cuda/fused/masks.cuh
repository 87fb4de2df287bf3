// Which columns of a box lie in the window of a row.
#pragma once

#include "fused/tables.cuh"

namespace cuneigh::fused {

// Sets `row_mask` of each of a warp's rows for a box of columns. A lane takes a row.
template <typename Plan>
__device__ void fill_row_masks(const FusedProblem<Plan::kRank>& problem,
                               const ColumnBox<Plan>& columns, Tables<Plan>& tables, int warp,
                               int lane) {
  constexpr int kRows = Plan::kRowTiles * 16;
  static_assert(kRows <= 32, "one row a lane");
  const int row = warp * kRows + lane % kRows;
  ColumnMask mask = columns.present;
  if (!Plan::kAdditional || !columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Range window = tables.window[row][r];
      const int size = problem.column_box[r];
      const int begin = smaller(larger(window.begin - columns.begin[r], 0), size);
      const int end = smaller(larger(window.end - columns.begin[r], 0), size);
      mask &= tables.prefix_mask[r][end] & ~tables.prefix_mask[r][begin];
    }
  }
  __syncwarp();
  tables.row_mask[row] = mask;
  __syncwarp();
}

// The part of a row's mask that a lane needs: its columns are 2 * (lane % 4) and the one after of
// every 8. mask(column) takes the number of a column less 2 * (lane % 4).
template <int kColumns>
struct LaneMask {
  unsigned word[(kColumns + 31) / 32];
  __device__ bool operator()(int column) const { return word[column / 32] >> column % 32 & 1; }
  __device__ static LaneMask all() {
    LaneMask mask;
#pragma unroll
    for (unsigned& word : mask.word) word = ~0u;
    return mask;
  }
  __device__ LaneMask(ColumnMask row_mask, int lane) {
#pragma unroll
    for (int i = 0; i < (kColumns + 31) / 32; ++i)
      word[i] = unsigned(row_mask >> 32 * i) >> lane % 4 * 2;
  }
  __device__ LaneMask() {}
};

}  // namespace cuneigh::fused
