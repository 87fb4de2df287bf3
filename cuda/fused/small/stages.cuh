// The order in which a block goes through its stages, and the copy of a stage to shared memory.
#pragma once

#include "fused/async.cuh"
#include "fused/small/smem.cuh"

namespace cuneigh::fused::small {

// One stage of one element of the batch.
struct StageOf {
  int batch;
  int head_in_group;  // of the columns, among the query heads that share the row's head
  int index;          // among the stages that the block's window union is cut into

  // Whether it is the first of an element of the batch
  __device__ bool is_first() const { return index == 0 && head_in_group == 0; }
};

// Moves on to the next stage. Returns false after the last.
template <typename Plan>
__device__ bool advance(const SmallWindowProblem<Plan::kRank>& problem,
                        const SmallTables<Plan>& tables, StageOf& stage) {
  if (!Plan::kOneStage && ++stage.index < tables.stages) return true;
  stage.index = 0;
  if (Plan::kRowsAreKeys) {
    if (++stage.head_in_group < problem.group_size) return true;
    stage.head_in_group = 0;
  }
  return ++stage.batch < smaller((tables.rows.batch + 1) * problem.batch_heads, problem.batch);
}

// The stages that a block has worked on before one.
template <typename Plan>
__device__ int stages_before(const SmallWindowProblem<Plan::kRank>& problem, const StageOf& stage,
                             const SmallTables<Plan>& tables) {
  int before = stage.batch - tables.rows.batch * problem.batch_heads;
  if (Plan::kRowsAreKeys) before = before * problem.group_size + stage.head_in_group;
  return Plan::kOneStage ? before : before * tables.stages + stage.index;
}

// Columns along the first axis from the first one of the block to the first one of a stage. The
// last of several stages begins early, so that it ends with the block's window union: its first
// columns were in the stage before.
template <typename Plan>
__device__ int stage_begin(const SmallWindowProblem<Plan::kRank>& problem,
                           const SmallTables<Plan>& tables, int index) {
  const Range range = tables.block_union[0];
  const int size = problem.stage[0];
  return smaller(index * size, larger(range.end - range.begin - size, 0));
}

// The element of an array that belongs to the first column of a stage.
template <typename Plan, typename Element>
__device__ Element* first_column_of(const SmallWindowProblem<Plan::kRank>& problem,
                                    const Origin<Element>& origin, const StageOf& stage,
                                    const SmallTables<Plan>& tables) {
  unsigned units = stage.batch * origin.batch;
  if (!Plan::kOneStage) units += stage_begin(problem, tables, stage.index) * origin.first_axis;
  if (Plan::kRowsAreKeys) units += stage.head_in_group * origin.head;
  return offset_by(origin.data, units);
}

// Copies both vectors of every column of a stage, or the qk vectors alone, out of arrays with these
// origins.
template <typename Plan, bool kVo = true, int kRowDim>
__device__ void load_stage(const SmallWindowProblem<Plan::kRank>& problem, const StageOf& stage,
                           const Origin<const typename Plan::Element>& qk_origin,
                           const Origin<const typename Plan::Element>& vo_origin,
                           SmallSmem<Plan, kRowDim>& smem, int buffer, unsigned thread) {
  using Element = typename Plan::Element;
  constexpr int kQkChunks = Plan::kHeadDim / 8, kVoChunks = Plan::kValueDim / 8;
  // A lane copies a chunk of each vector, or where one line holds both, a chunk of one of them
  constexpr bool kTogether = kQkChunks + kVoChunks <= 8;
  constexpr int kLanes = kTogether ? 8 : kQkChunks > kVoChunks ? kQkChunks : kVoChunks;
  constexpr int kStride = Plan::kWarps * 32 / kLanes, kUnroll = 4;
  const int chunk = thread % kLanes, begin = thread / kLanes;
  const bool of_qk = chunk < kQkChunks;
  const auto& tables = smem.tables;
  const Element* qk = first_column_of(problem, qk_origin, stage, tables) + chunk * 8;
  const Element* vo = first_column_of(problem, vo_origin, stage, tables) + chunk * 8;
  const Element* either = of_qk ? qk : vo - kQkChunks * 8;
  const unsigned target = smem.stage_address(buffer);
  const ColumnOffsets* offsets = smem.column_offsets() + begin;
#pragma unroll 1
  for (int left = tables.stage_columns - begin; left > 0; left -= kUnroll * kStride) {
    uint4 offset[kUnroll];  // all read before the first copy, which a later read would wait for
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (i * kStride < left) offset[i] = *reinterpret_cast<const uint4*>(&offsets[i * kStride]);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (i * kStride >= left) continue;
      const ColumnOffsets column = {offset[i].x, offset[i].y, offset[i].z, offset[i].w};
      const unsigned address = target + column.in_stage;
      if constexpr (kTogether && kVo) {
        const unsigned units = of_qk ? column.qk : column.vo;
        copy_16_bytes(chunk_address(address, chunk), offset_by(either, units));
      } else {
        if (of_qk) copy_16_bytes(chunk_address(address, chunk), offset_by(qk, column.qk));
        if (kVo && chunk < kVoChunks)
          copy_16_bytes(chunk_address(address, kQkChunks + chunk), offset_by(vo, column.vo));
      }
    }
    offsets += kUnroll * kStride;
  }
}

}  // namespace cuneigh::fused::small
