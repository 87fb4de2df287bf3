// The box of rows of a block and the windows of rows, for all fused kernels. problem.cuh says what
// rows, columns and windows are.
#pragma once

#include "cuneigh/boxes.cuh"

namespace cuneigh::fused {

// The box of rows of a block: the batch and head it belongs to, and where it begins.
template <int kRank>
struct RowBox {
  int batch, head;
  GroupIndex first[kRank];  // dilation group and first group index along each axis
};

// Finds where the rows of this block begin. Returns the block's number among those that have these
// rows; each of them has other batch-heads.
template <typename Plan, typename Problem>
__device__ unsigned find_rows(const Problem& problem, GroupIndex (&first)[Plan::kRank]) {
  unsigned block = blockIdx.x;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis& axis = problem.axes[r];
    const int length = Plan::kRowsAreKeys ? axis.key_length : axis.length;
    const int size = problem.warp_box[r] * problem.warps[r];
    first[r] = box_begin(axis.dilation, length, block % problem.boxes[r], size);
    block /= problem.boxes[r];
  }
  return block;
}

template <typename Plan, typename Problem>
__device__ RowBox<Plan::kRank> row_box(const Problem& problem) {
  RowBox<Plan::kRank> box;
  const unsigned block = find_rows<Plan>(problem, box.first);
  const int heads = Plan::kRowsAreKeys ? problem.heads / problem.group_size : problem.heads;
  box.head = block % heads;
  box.batch = block / heads;
  return box;
}

// The window of a row along an axis, in group indices.
template <typename Plan>
__device__ Range window_of_row(const Axis& axis, int index, int group) {
  return Plan::kRowsAreKeys ? axis.inverse(index, group) : axis.window(index, group);
}

// Rows in a dilation group.
template <typename Plan>
__device__ int rows_of_group(const Axis& axis, int group) {
  return Plan::kRowsAreKeys ? axis.key_group_length(group) : axis.group_length(group);
}

// The dilation group of the columns that rows of `group` may have in their windows.
template <typename Plan>
__device__ int column_group(const Axis& axis, int group) {
  return Plan::kRowsAreKeys ? axis.query_group(group) : axis.key_group(group);
}

// The given columns of that group.
template <typename Plan>
__device__ int columns_of_group(const Axis& axis, int group) {
  const int columns = column_group<Plan>(axis, group);
  return Plan::kRowsAreKeys ? axis.group_length(columns) : axis.key_group_length(columns);
}

// The window union of a block of at most `size` rows that begins at `first`. Windows are INCREASING
// (the contract in cuneigh/_window.py), so that the first and the last row tell it.
template <typename Plan>
__device__ Range union_of_block(const Axis& axis, GroupIndex first, int size) {
  const auto [group, begin] = first;
  const int last = smaller(begin + size, rows_of_group<Plan>(axis, group)) - 1;
  return {window_of_row<Plan>(axis, begin, group).begin,
          window_of_row<Plan>(axis, last, group).end};
}

}  // namespace cuneigh::fused
