// What the launcher tells a small-window kernel about the problem, and the words of these kernels
// beside those of fused/problem.cuh:
//
//   stage   The box of columns that is in shared memory at a time. It is whole along every axis but
//           the first. Mostly one stage holds the window union of the block.
//   tile    The box of columns that a warp multiplies its sixteen rows with, taken out of the
//   stage.
//           It is as large as the largest window union of a warp. It has kColumns slots; slots past
//           its end repeat some of its first eight columns.
//   unit    What offsets in global memory are counted in: 16 bytes in arrays of vectors, one
//   element
//           in arrays of numbers. 32 bits are enough for any offset.
//
// ldmatrix takes an address for every column, so that picking a tile out of a stage costs nothing.
// The tables of a block are the same for every element of the batch, so that it works through
// several of them with one head. The launcher may let heads and batch elements change places.
#pragma once

#include "cuneigh/layout.cuh"

namespace cuneigh::fused::small {

// A number to divide by, as a multiplication: exact where it times the dividend is below 2^20.
struct FastDivmod {
  int divisor;
  unsigned inverse;  // 2^20 / divisor, rounded up

  __device__ operator int() const { return divisor; }
  __device__ int quotient(int x) const { return x * inverse >> 20; }
  __device__ int remainder(int x) const { return x - quotient(x) * divisor; }
};

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused/small/launch.py.
template <int kRank>
struct SmallWindowProblem {
  Axis axes[kRank];
  FastDivmod warp_box[kRank];  // rows of a warp along each axis
  FastDivmod warps[kRank];     // warps of a block along each axis
  FastDivmod stage[kRank];     // columns of a stage along each axis
  FastDivmod tile[kRank];      // columns of a tile along each axis
  int boxes[kRank];            // boxes of rows along each axis, those of all dilation groups
  int batch;
  int batch_heads;  // that a block works through: elements of the batch, with one head
  int heads;
  int group_size;        // query heads that share a key head
  float scale;           // times log2(e); positive
  float gradient_scale;  // the scale itself
  // Where TMA brings stages: bytes in a stage from the qk vector of a column to its vo vector, and
  // dimensions from one head, or from one element of the batch, to the next in 3-D
  int vo_offset, head_pitch, batch_pitch;
};
static_assert(sizeof(FastDivmod) == 8 && sizeof(SmallWindowProblem<1>) == 72 + sizeof(Axis) &&
                  sizeof(SmallWindowProblem<2>) == 108 + 2 * sizeof(Axis) &&
                  sizeof(SmallWindowProblem<3>) == 144 + 3 * sizeof(Axis),
              "the record that cuneigh/_backends/fused/small/launch.py packs has these sizes");

}  // namespace cuneigh::fused::small
