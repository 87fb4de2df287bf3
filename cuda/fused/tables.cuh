// The tables in shared memory that a block fills once: all that stays the same from one box of
// columns to the next and from one batch-head to the next.
#pragma once

#include "cuneigh/boxes.cuh"
#include "cuneigh/key_mask.cuh"
#include "fused/problem.cuh"
#include "fused/rows.cuh"

namespace cuneigh::fused {

// Columns of a box as bits: bit i stands for the column in slot i.
using ColumnMask = unsigned long long;

// Bytes from the vectors of the first column of a box to those of another column.
struct alignas(16) VectorOffsets {
  long long qk, vo;
};

// Elements from what is beside the vectors, and from rpb, of the first column of a box to those of
// another column.
struct ScalarOffsets {
  int extra, bias;
};

// Whether no, some or all pairs of a warp's rows and a box's columns are visible.
enum class Visibility { kNone, kSome, kAll };

// Whether columns may be hidden by a key mask.
template <typename Plan>
constexpr bool kMaskedColumns = Plan::kKeyMask && !Plan::kRowsAreKeys;

// What there is of a column beside its vectors: the statistics of a query, or whether a key may be
// seen.
template <bool kMasked>
struct ExtraOf {
  using Type = float2;
};
template <>
struct ExtraOf<true> {
  using Type = bool;
};
template <typename Plan>
using Extra = typename ExtraOf<kMaskedColumns<Plan>>::Type;

// A box of columns: out of a block's window union, or of additional keys.
template <typename Plan>
struct alignas(16) ColumnBox {
  const typename Plan::Element *qk, *vo;  // of the first column
  const Extra<Plan>* extra;               // of the first column
  ColumnMask present;                     // slots whose columns are present
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
  Range window[kRows][Plan::kRank];  // empty where there is no row, kHidden if a mask hides it
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

// The array of what there is beside vectors.
template <typename Plan>
__device__ const auto& extra_of(const Columns<Plan>& arrays, const KeyMask<Plan>& mask) {
  if constexpr (kMaskedColumns<Plan>)
    return mask.key_mask;
  else
    return arrays.statistics;
}

// The window of a row that is a hidden key.
constexpr int kHidden = -1;

// Fills `token`, `window` and `bias_offset`: every warp takes a box of rows of its own.
template <typename Plan, typename Bias>
__device__ void fill_rows(const FusedProblem<Plan::kRank>& problem, const Bias& rpb,
                          const KeyMask<Plan>& mask, int batch,
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
      const int shift = Plan::kRowsAreKeys ? axis.inverse_shift(group) : axis.shift(group);
      bias += (axis.kernel_size - 1 - kSign * index[r] + shift) * rpb.token[r];
    }
    if constexpr (Plan::kKeyMask && Plan::kRowsAreKeys) {
      if (exists && mask.hides(batch, tables.token[row])) {
#pragma unroll
        for (int r = 0; r < kRank; ++r) tables.window[row][r] = {0, kHidden};
      }
    }
    tables.bias_offset[row] = int(bias);
  }
}

// Fills `vector_offset` and `scalar_offset`: the columns of a box come in raster order.
template <typename Plan, typename Bias>
__device__ void fill_column_offsets(const FusedProblem<Plan::kRank>& problem,
                                    const Columns<Plan>& arrays, const Bias& rpb,
                                    const KeyMask<Plan>& mask, Tables<Plan>& tables, int thread) {
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
      scalar_offset.extra += int(tokens * extra_of(arrays, mask).token[r]);
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
  static_assert(kWarpRows <= 32, "one row a lane");
  const int warp = thread / 32, lane = thread % 32, row = warp * kWarpRows + lane;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    WindowUnion windows = WindowUnion::of_none();
    if (lane < kWarpRows) {
      if (Plan::kKeyMask && tables.window[row][r].end == kHidden)
        windows.all = WindowUnion::of_none().any;
      else if (tables.token[row][0] >= 0)
        windows.add(tables.window[row][r]);
    }
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

// On a ring the columns of one lap that are given end before the next lap begins. The end of those
// from column `begin` on, out of a window union that ends with `end`.
template <typename Plan>
__device__ int end_of_given(const Axis& axis, int group, int end, int begin) {
  if (!axis.crosses()) return end;
  const int given = columns_of_group<Plan>(axis, group);
  return smaller(end, begin - axis.turned(begin) + given);
}

// The first given column of the lap after that of `begin`.
__device__ inline int next_lap(const Axis& axis, int begin) {
  return begin - axis.turned(begin) + axis.ring();
}

// Has `block_union` begin with given columns, and makes it empty along all axes if it is along one.
template <typename Plan>
__device__ void leave_out_hidden(const FusedProblem<Plan::kRank>& problem, Tables<Plan>& tables) {
  bool any = true;
  for (int r = 0; r < Plan::kRank; ++r) {
    const Axis& axis = problem.axes[r];
    Range& range = tables.block_union[r];
    if (axis.crosses() &&
        end_of_given<Plan>(axis, tables.first[r].group, range.end, range.begin) <= range.begin)
      range.begin = next_lap(axis, range.begin);
    any &= range.begin < range.end;
  }
  if (any) return;
  for (Range& range : tables.block_union) range.end = range.begin;
}

template <typename Plan, typename Bias>
__device__ void fill_tables(const FusedProblem<Plan::kRank>& problem, const Columns<Plan>& arrays,
                            const Bias& rpb, const KeyMask<Plan>& mask, Tables<Plan>& tables,
                            int thread) {
  GroupIndex first[Plan::kRank];
  const int share = find_rows<Plan>(problem, first);
  if (thread < Plan::kRank) {  // a thread takes an axis
    Axis axis = problem.axes[0];
    GroupIndex begin = first[0];
    int size = problem.warp_box[0] * problem.warps[0];
#pragma unroll
    for (int r = 1; r < Plan::kRank; ++r) {  // to index by the thread would copy all to memory
      if (thread != r) continue;
      axis = problem.axes[r];
      begin = first[r];
      size = problem.warp_box[r] * problem.warps[r];
    }
    tables.first[thread] = begin;
    tables.block_union[thread] = union_of_block<Plan>(axis, begin, size);
  }
  if (Axis::kIsPart) __syncwarp();  // the axes of a block lie in one warp
  if (thread == 0) {
    tables.share = share;
    if constexpr (Axis::kIsPart) leave_out_hidden(problem, tables);
  }
  const int batch = Plan::kRowsAreKeys ? share / (problem.heads / problem.group_size) : 0;
  fill_rows(problem, rpb, mask, batch, first, tables, thread);
  fill_column_offsets(problem, arrays, rpb, mask, tables, thread);
  __syncthreads();
  fill_warp_unions(tables, thread);
  fill_prefix_masks(problem, tables, thread);
}

}  // namespace cuneigh::fused
