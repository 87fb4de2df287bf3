// The tables in shared memory that a block fills once: all that stays the same from one box of
// columns to the next and from one batch-head to the next.
#pragma once

#include "cuneigh/boxes.cuh"
#include "cuneigh/layout.cuh"
#include "fused/problem.cuh"
#include "fused/rows.cuh"

namespace cuneigh::fused {

// Columns of a box as bits: bit i stands for the column in slot i.
using ColumnMask = unsigned long long;

// Bytes from the vectors of the first column of a box to those of another column.
struct alignas(16) VectorOffsets {
  long long qk, vo;
};

// Elements from the statistics and from rpb of the first column of a box to those of another
// column.
struct ScalarOffsets {
  int statistics, bias;
};

// Whether no, some or all pairs of a warp's rows and a box's columns are visible.
enum class Visibility { kNone, kSome, kAll };

// A box of columns: out of a block's window union, or of additional keys.
template <typename Plan>
struct alignas(16) ColumnBox {
  const typename Plan::Element *qk, *vo;  // of the first column
  const float2* statistics;               // of the first column, where columns are queries
  ColumnMask present;                     // slots whose columns are in the block's window union
  int begin[Plan::kRank];                 // group indices; the number of the first additional key
  int batch, head;                        // of the queries
  bool additional;
  bool past_end;          // there is no such box: the walk is over
  Visibility visibility;  // to the rows of a warp
};

// In the fields of rows and warps the first index says which one of the block it is.
template <typename Plan>
struct Tables {
  static constexpr int kRows = Plan::kWarps * Plan::kRowTiles * 16;

  // What a walk reads for every box comes first, so that it is aligned for wide loads
  ColumnBox<Plan> walk[Plan::kWarps][2];              // the next two boxes of each warp's walk
  WindowUnion warp_union[Plan::kWarps][Plan::kRank];  // of each warp's rows
  VectorOffsets vector_offset[1 + Plan::kAdditional][Plan::kColumns];  // window; additional keys
  Range block_union[Plan::kRank];                                      // of the block's rows
  GroupIndex first[Plan::kRank];                                       // of the rows
  // prefix_mask[r][i]: the columns of a box whose coordinate along axis r is below i
  ColumnMask prefix_mask[Plan::kRank][Plan::kColumns + 1];
  ColumnMask row_mask[kRows];  // visible columns of the box at hand
  ScalarOffsets scalar_offset[Plan::kColumns];
  Range window[kRows][Plan::kRank];  // empty where there is no row
  int token[kRows][Plan::kRank];     // -1 where there is no row
  int bias_offset[kRows];            // in elements of rpb
  int share;                         // the block's number among those that have these rows
};

// The arrays of the columns.
template <typename Plan>
struct Columns {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  const Vectors &qk, &vo, &additional_qk, &additional_vo;
  const View<const float2, Plan::kRank>& statistics;
};

// Fills `token`, `window` and `bias_offset`: every warp takes a box of rows of its own.
template <typename Plan, typename Bias>
__device__ void fill_rows(const FusedProblem<Plan::kRank>& problem, const Bias& rpb,
                          const GroupIndex (&first)[Plan::kRank], Tables<Plan>& tables,
                          int thread) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  constexpr int kWarpRows = Plan::kRowTiles * 16;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;
  for (int row = thread; row < Tables<Plan>::kRows; row += kThreads) {
    int in_warp = row % kWarpRows, warp = row / kWarpRows;
    bool exists = true;
    int index[kRank];
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int inside = r == 0 ? in_warp : in_warp % problem.warp_box[r];
      index[r] = first[r].index + warp % problem.warps[r] * problem.warp_box[r] + inside;
      exists &= inside < problem.warp_box[r] &&
                index[r] < rows_of_group<Plan>(problem.axes[r], first[r].group);
      in_warp /= problem.warp_box[r];
      warp /= problem.warps[r];
    }
    long long bias = 0;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int group = first[r].group;
      tables.token[row][r] = exists ? axis.token({group, index[r]}) : -1;
      tables.window[row][r] = exists ? window_of_row<Plan>(axis, index[r], group) : Range{0, 0};
      bias += (axis.kernel_size - 1 - kSign * index[r]) * rpb.token[r];
    }
    tables.bias_offset[row] = int(bias);
  }
}

// Fills `vector_offset` and `scalar_offset`: the columns of a box come in raster order.
template <typename Plan, typename Bias>
__device__ void fill_column_offsets(const FusedProblem<Plan::kRank>& problem,
                                    const Columns<Plan>& arrays, const Bias& rpb,
                                    Tables<Plan>& tables, int thread) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;
  for (int slot = thread; slot < Plan::kColumns; slot += kThreads) {
    int rest = slot;
    VectorOffsets offset = {};
    ScalarOffsets scalar_offset = {};
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int coordinate = r == 0 ? rest : rest % problem.column_box[r];
      rest /= problem.column_box[r];
      const long long tokens = (long long)coordinate * problem.axes[r].dilation;
      offset.qk += tokens * arrays.qk.token[r];
      offset.vo += tokens * arrays.vo.token[r];
      scalar_offset.statistics += int(tokens * arrays.statistics.token[r]);
      scalar_offset.bias += int(kSign * coordinate * rpb.token[r]);
    }
    constexpr int kBytes = sizeof(typename Plan::Element);
    tables.vector_offset[0][slot] = {offset.qk * kBytes, offset.vo * kBytes};
    if (Plan::kAdditional)
      tables.vector_offset[1][slot] = {slot * arrays.additional_qk.token[0] * kBytes,
                                       slot * arrays.additional_vo.token[0] * kBytes};
    tables.scalar_offset[slot] = scalar_offset;
  }
}

// Fills `warp_union` from the windows of all rows.
template <typename Plan>
__device__ void fill_warp_unions(Tables<Plan>& tables, int thread) {
  constexpr int kWarpRows = Plan::kRowTiles * 16;
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    WindowUnion windows = WindowUnion::of_none();
    for (int row = warp * kWarpRows + lane; row < (warp + 1) * kWarpRows; row += 32)
      if (tables.token[row][0] >= 0) windows.add(tables.window[row][r]);
    windows = windows.of_warp();
    if (lane == 0) tables.warp_union[warp][r] = windows;
  }
}

// Fills `prefix_mask`. In raster order the pattern of an axis repeats for every coordinate of the
// axes before it.
template <typename Plan>
__device__ void fill_prefix_masks(const FusedProblem<Plan::kRank>& problem, Tables<Plan>& tables,
                                  int thread) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  int inner = 1;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int period = inner * problem.column_box[r];
    int area = 1;
#pragma unroll
    for (int other = 0; other < kRank; ++other) area *= problem.column_box[other];
    for (int index = thread; index <= problem.column_box[r]; index += kThreads) {
      const int bits = index * inner;
      const ColumnMask pattern = bits < 64 ? (1ull << bits) - 1 : ~0ull;
      ColumnMask mask = 0;
      for (int start = 0; start < area; start += period) mask |= pattern << start;
      tables.prefix_mask[r][index] = mask;
    }
    inner = period;
  }
}

template <typename Plan, typename Bias>
__device__ void fill_tables(const FusedProblem<Plan::kRank>& problem, const Columns<Plan>& arrays,
                            const Bias& rpb, Tables<Plan>& tables, int thread) {
  GroupIndex first[Plan::kRank];
  const int share = find_rows<Plan>(problem, first);
  if (thread == 0) {
    tables.share = share;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      tables.first[r] = first[r];
      tables.block_union[r] =
          union_of_block<Plan>(problem.axes[r], first[r], problem.warp_box[r] * problem.warps[r]);
    }
  }
  fill_rows(problem, rpb, first, tables, thread);
  fill_column_offsets(problem, arrays, rpb, tables, thread);
  __syncthreads();
  fill_warp_unions(tables, thread);
  fill_prefix_masks(problem, tables, thread);
}

}  // namespace cuneigh::fused
