// The rows of a block, for the fused kernels and those for small windows. Forward and the gradient
// of query have queries for rows and keys for columns; the gradients of key and value have it the
// other way round (Plan::kRowsAreKeys), and walk the inverse windows.
#pragma once

#include "cuneigh/boxes.cuh"

namespace cuneigh::fused {

// Shared memory moves in chunks of 16 bytes. Head dimensions are padded to an even number of them,
// and one more stands between rows: eight rows at the same chunk hit different banks.
template <typename Element>
constexpr int kChunk = 16 / sizeof(Element);
template <typename Element, int kDim>
constexpr int kPitchOf = kDim + kChunk<Element>;

// The rows of a block.
template <int kRank>
struct RowBox {
  int batch, head;
  Place first[kRank];  // dilation group and first group index
};

// Finds where the rows of a block begin. Returns which of the blocks with these rows it is.
template <typename Plan, typename Problem>
__device__ unsigned find_rows(const Problem& problem, Place (&first)[Plan::kRank]) {
  unsigned block = blockIdx.x;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis& axis = problem.axes[r];
    const int length = Plan::kRowsAreKeys ? axis.key_length : axis.length;
    const int size = problem.warp_box[r] * problem.warps[r];
    first[r] = box_place(axis.dilation, length, block % problem.boxes[r], size);
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

// The columns that a row meets along an axis: a query's window, or the queries that see a key.
template <typename Plan>
__device__ Range columns_of(const Axis& axis, int index, int group) {
  return Plan::kRowsAreKeys ? axis.inverse(index, group) : axis.window(index, group);
}
template <typename Plan>
__device__ int rows_of_group(const Axis& axis, int group) {
  return Plan::kRowsAreKeys ? axis.key_group_length(group) : axis.group_length(group);
}

}  // namespace cuneigh::fused
