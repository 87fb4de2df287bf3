// Stages and rows that TMA brings: vectors of each array follow each other, 2 * kHeadDim bytes
// each, in boxes that begin at multiples of 1024 bytes. Chunk i of 16 bytes of a line of 128 bytes
// lies where chunk i ^ phase would, the phase being the number of the line in the box modulo 8;
// where vectors have 64 bytes, two of them are a line, and of its chunks four are permuted at a
// time.
//
// Between the vectors of the columns that follow each other in a tile there must be as many columns
// in the stage, modulo 8: `padded_stage` of cuneigh/_backends/fused/small/tma.py sees to that.
#pragma once

#include "fused/small/stages.cuh"

namespace cuneigh::fused::small {

// Coordinates of a head in an element of the batch. Along three token axes there is none for both.
template <typename Plan>
__device__ void find_head(const SmallWindowProblem<Plan::kRank>& problem, int batch, int head,
                          int (&c)[5]) {
  c[0] = c[1] = c[2] = 0;
  c[3] = head;
  c[4] = batch;
  if (Plan::kRank == 3) {
    c[0] = problem.head_pitch * head + problem.batch_pitch * batch;
    c[4] = problem.head_pitch > 0 ? batch : head;
  }
}

// Has TMA bring both vectors of every column of a stage. One thread of the block must call it.
template <typename Plan, typename Smem>
__device__ void load_stage_box(const SmallWindowProblem<Plan::kRank>& problem, const StageOf& stage,
                               const TensorMap& qk_map, const TensorMap& vo_map, Barrier& full,
                               Smem& smem, int buffer) {
  constexpr int kRank = Plan::kRank;
  const auto& tables = smem.tables;
  const auto& rows = tables.rows;
  int c[5];
  find_head<Plan>(problem, stage.batch,
                  Plan::kRowsAreKeys ? rows.head * problem.group_size + stage.head_in_group
                                     : rows.head / problem.group_size,
                  c);
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const Axis& axis = problem.axes[r];
    int index = tables.block_union[r].begin;
    if (r == 0 && !Plan::kOneStage) index += stage_begin(problem, tables, stage.index);
    c[kRank - r] = axis.token({column_group<Plan>(axis, rows.first[r].group), index});
  }
  const unsigned target = smem.stage_address(buffer);
  full.arrive_and_expect(2 * tables.stage_columns * kColumnBytes<Plan>);
  load_box(target, qk_map, full, c);
  load_box(target + problem.vo_offset, vo_map, full, c);
}

// Has TMA bring some vectors of a warp's rows, one of each row in each of the arrays. One lane must
// call it, also if the rows are there already.
template <typename Plan, typename Smem, int kArrays>
__device__ void load_row_boxes(const SmallWindowProblem<Plan::kRank>& problem, const StageOf& stage,
                               int warp, const TensorMap* const (&maps)[kArrays], Barrier& full,
                               Smem& smem) {
  constexpr int kRank = Plan::kRank;
  if (!stage.is_first()) return full.arrive_and_expect(0);
  const auto& rows = smem.tables.rows;
  int c[5], count = 1, rest = warp;
  find_head<Plan>(problem, stage.batch, rows.head, c);
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const FastDivmod warps = problem.warps[r], box = problem.warp_box[r];
    const int index = (r == 0 ? rest : warps.remainder(rest)) * box + rows.first[r].index;
    c[kRank - r] = problem.axes[r].token({rows.first[r].group, index});
    count *= box;
    rest = warps.quotient(rest);
  }
  full.arrive_and_expect(kArrays * count * 2 * Plan::kHeadDim);
#pragma unroll
  for (int array = 0; array < kArrays; ++array)
    load_box(smem.row_address(array, warp), *maps[array], full, c);
}

// Where a lane finds operands in a warp's rows of one array, as ldmatrix takes them: left ones
// [16, 16], and right ones of products with transposed rows. `dim` is a multiple of 16.
template <int kDim>
__device__ unsigned left_operand_address(unsigned rows, int dim, int lane) {
  const int phase = kDim == 32 ? lane / 2 % 4 : lane % 8;
  return (rows + lane % 16 * kDim * 2 + (phase ^ lane / 16) * 16) ^ dim * 2;
}
template <int kDim>
__device__ unsigned right_operand_address(unsigned rows, int dim, int lane) {
  const int row = lane / 16 * 8 + lane % 8, phase = kDim == 32 ? row / 2 % 4 : row % 8;
  return (rows + row * kDim * 2 + (phase ^ lane / 8 % 2) * 16) ^ dim * 2;
}

}  // namespace cuneigh::fused::small
