// What the launcher tells a fused kernel about the problem, and the words of all fused kernels:
//
//   rows, columns   A block keeps a box of rows and goes over boxes of columns. In the forward pass
//                   and for dQ rows are queries and columns are keys. For dK and dV rows are keys
//                   and columns are queries (Plan::kRowsAreKeys).
//   window          The columns that a row is multiplied with: the window of a query, or the
//                   inverse window of a key, which holds the queries that see it.
//   window union    The columns that at least one row of a warp or block has in its window. Windows
//                   are as cuneigh/_window.py promises under "The contract", so that along each
//                   axis the union is one range: from the begin of the first row's window to the
//                   end of the last row's.
//   qk, vo          The two vectors of a row or a column: qk [kHeadDim] is a query or a key, vo
//                   [kValueDim] is a value or the gradient of an output.
//   batch-head      One head of the rows in one element of the batch.
//   slot            A position in a box of columns, in raster order. Slots past the end of the box
//                   belong to no column.
//   present         A column is present if it lies in the block's window union, is given, and is
//   not
//                   a key that a mask hides. Zeros stand for the vectors of slots that are not.
#pragma once

#include "cuneigh/window.cuh"

namespace cuneigh::fused {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused/launch.py.
template <int kRank>
struct FusedProblem {
  Axis axes[kRank];
  int warp_box[kRank];    // rows of a warp along each axis
  int warps[kRank];       // warps of a block along each axis
  int column_box[kRank];  // columns of a box along each axis
  int boxes[kRank];       // boxes of rows along each axis, those of all dilation groups
  int batch;
  int heads;
  int group_size;   // query heads that share a key head
  int batch_heads;  // that a block works through
  int head_dim;
  int value_dim;
  int additional;        // number of additional keys
  int sign;              // of the scale: 1, 0 or -1
  float scale;           // its magnitude times log2(e); log2(e) where the sign is 0
  float gradient_scale;  // the scale itself
};
static_assert(sizeof(FusedProblem<1>) == 56 + sizeof(Axis) &&
                  sizeof(FusedProblem<2>) == 72 + 2 * sizeof(Axis) &&
                  sizeof(FusedProblem<3>) == 88 + 3 * sizeof(Axis),
              "the record that cuneigh/_backends/fused/launch.py packs has these sizes");

struct BatchHead {
  int batch, head;
};

}  // namespace cuneigh::fused
