// Boxes of columns that come with their tangents.
#pragma once

#include "fused/column_copies.cuh"
#include "fused/walk.cuh"

namespace cuneigh::fused {

// What load_columns does, and the same with the tangents, which lie in memory like what they are
// of: with those of the second vectors if kVoMoves.
template <typename Plan, bool kVoMoves = true, typename Element>
__device__ void load_moving_columns(const FusedProblem<Plan::kRank>& problem,
                                    const Columns<Plan>& arrays, const Columns<Plan>& tangents,
                                    const ColumnBox<Plan>& columns, const Tables<Plan>& tables,
                                    int thread,
                                    Element (*qk_smem)[kVectorPitch<Element, Plan::kHeadDim>],
                                    Element (*vo_smem)[kVectorPitch<Element, Plan::kValueDim>],
                                    Element (*d_qk_smem)[kVectorPitch<Element, Plan::kHeadDim>],
                                    Element (*d_vo_smem)[kVectorPitch<Element, Plan::kValueDim>]) {
  ColumnBox<Plan> moved = columns;
  if (Plan::kAdditional && columns.additional) {
    moved.qk = like(columns.qk, arrays.additional_qk, tangents.additional_qk);
    if (kVoMoves) moved.vo = like(columns.vo, arrays.additional_vo, tangents.additional_vo);
  } else {
    moved.qk = like(columns.qk, arrays.qk, tangents.qk);
    if (kVoMoves) moved.vo = like(columns.vo, arrays.vo, tangents.vo);
  }
  load_columns<Plan>(problem, columns, tables, thread, qk_smem, vo_smem);
  load_columns<Plan, kVoMoves>(problem, moved, tables, thread, d_qk_smem, d_vo_smem);
}

}  // namespace cuneigh::fused
