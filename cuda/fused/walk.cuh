// The walk over boxes of columns. The boxes begin where the block's window union begins and cover
// it in raster order. After them come the additional keys, where rows are queries. Where rows are
// keys, the same walk follows in the next query head that shares them.
#pragma once

#include "fused/tables.cuh"

namespace cuneigh::fused {

// The head of a box of columns.
template <typename Plan>
__device__ int column_head(const FusedProblem<Plan::kRank>& problem,
                           const ColumnBox<Plan>& columns) {
  return Plan::kRowsAreKeys ? columns.head : columns.head / problem.group_size;
}

// The element of an array that belongs to the first column of a box.
template <typename Plan, typename Element>
__device__ Element* first_column_in(const FusedProblem<Plan::kRank>& problem,
                                    const Tables<Plan>& tables, const ColumnBox<Plan>& columns,
                                    const View<Element, Plan::kRank>& view) {
  Element* first = view.at(columns.batch, column_head(problem, columns));
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    const Axis& axis = problem.axes[r];
    const int group = column_group<Plan>(axis, tables.first[r].group);
    first += axis.token({group, axis.turned(columns.begin[r])}) * view.token[r];
  }
  return first;
}

// Those slots of a box, out of `present`, whose keys no mask hides. All lanes of a warp take part.
template <typename Plan>
__device__ ColumnMask seen_slots(const Tables<Plan>& tables, const ColumnBox<Plan>& box, int lane) {
  ColumnMask seen = 0;
  if constexpr (kMaskedColumns<Plan>) {
#pragma unroll
    for (int first = 0; first < Plan::kColumns; first += 32) {
      const int slot = first + lane;
      const bool is_seen = slot < Plan::kColumns && (box.present >> slot & 1) &&
                           box.extra[tables.scalar_offset[slot].extra];
      seen |= (ColumnMask)__ballot_sync(0xffffffffu, is_seen) << first;
    }
  }
  return seen;
}

// Sets `present` and `visibility` of a box, or `past_end`.
template <typename Plan>
__device__ void classify(const FusedProblem<Plan::kRank>& problem, const Tables<Plan>& tables,
                         int warp, ColumnBox<Plan>& box) {
  constexpr ColumnMask kAll = ~0ull >> (64 - Plan::kColumns);
  if (Plan::kAdditional && box.additional) {
    const int left = problem.additional - box.begin[0];
    box.past_end = left <= 0;
    box.present = left < Plan::kColumns ? ~(~0ull << larger(left, 0)) : kAll;
    box.visibility = box.present == kAll ? Visibility::kAll : Visibility::kSome;
    return;
  }
  box.present = kAll;
  bool any = true, all = true;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    const int begin = box.begin[r], end = begin + problem.column_box[r];
    const int present_end = end_of_given<Plan>(problem.axes[r], tables.first[r].group,
                                               tables.block_union[r].end, begin);
    box.present &= tables.prefix_mask[r][smaller(present_end - begin, problem.column_box[r])];
    const WindowUnion windows = tables.warp_union[warp][r];
    any &= !windows.misses(begin, end);
    all &= windows.covers(begin, end);
  }
  if constexpr (kMaskedColumns<Plan>) {
    box.present = seen_slots(tables, box, threadIdx.x % 32);
    any &= box.present != 0;
  }
  all &= box.present == kAll;
  box.visibility = !any ? Visibility::kNone : all ? Visibility::kAll : Visibility::kSome;
}

// The first box of columns of a batch-head.
template <typename Plan>
__device__ ColumnBox<Plan> first_box(const FusedProblem<Plan::kRank>& problem,
                                     const Columns<Plan>& arrays, const KeyMask<Plan>& mask,
                                     const Tables<Plan>& tables, int warp, BatchHead rows) {
  ColumnBox<Plan> box;
  box.additional = box.past_end = false;
  box.batch = rows.batch;
  box.head = Plan::kRowsAreKeys ? rows.head * problem.group_size : rows.head;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) box.begin[r] = tables.block_union[r].begin;
  box.qk = first_column_in(problem, tables, box, arrays.qk);
  box.vo = first_column_in(problem, tables, box, arrays.vo);
  if (Plan::kRowsAreKeys || kMaskedColumns<Plan>)
    box.extra = first_column_in(problem, tables, box, extra_of(arrays, mask));
  classify<Plan>(problem, tables, warp, box);
  return box;
}

// The box of columns that follows another. Boxes of which a mask hides all keys are left out.
template <typename Plan>
__device__ ColumnBox<Plan> next_box(const FusedProblem<Plan::kRank>& problem,
                                    const Columns<Plan>& arrays, const KeyMask<Plan>& mask,
                                    const Tables<Plan>& tables, int warp, ColumnBox<Plan> box) {
  do {
    const bool in_window = !Plan::kAdditional || !box.additional;
    bool carry = in_window;
#pragma unroll
    for (int r = Plan::kRank - 1; r >= 0; --r) {
      const Axis& axis = problem.axes[r];
      const Range range = tables.block_union[r];
      int begin = box.begin[r] + problem.column_box[r];
      if (axis.crosses() &&
          begin >= end_of_given<Plan>(axis, tables.first[r].group, range.end, box.begin[r]))
        begin = next_lap(axis, box.begin[r]);
      const bool over = begin >= range.end;
      begin = over ? range.begin : begin;
      const long long tokens =
          carry ? (axis.turned(begin) - axis.turned(box.begin[r])) * (long long)axis.dilation : 0;
      box.qk += tokens * arrays.qk.token[r];
      box.vo += tokens * arrays.vo.token[r];
      if (Plan::kRowsAreKeys || kMaskedColumns<Plan>)
        box.extra += tokens * extra_of(arrays, mask).token[r];
      box.begin[r] = carry ? begin : box.begin[r];
      carry &= over;
    }
    if (Plan::kRowsAreKeys) {
      if (carry) {
        ++box.head;
        box.qk += arrays.qk.head;
        box.vo += arrays.vo.head;
        box.extra += extra_of(arrays, mask).head;
        box.past_end = box.head % problem.group_size == 0;
      }
    } else if (Plan::kAdditional) {
      if (carry) {
        const int head = column_head(problem, box);
        box.additional = true;
        box.begin[0] = 0;
        box.qk = arrays.additional_qk.at(box.batch, head);
        box.vo = arrays.additional_vo.at(box.batch, head);
      } else if (!in_window) {
        box.begin[0] += Plan::kColumns;
        box.qk += Plan::kColumns * arrays.additional_qk.token[0];
        box.vo += Plan::kColumns * arrays.additional_vo.token[0];
      }
    } else {
      box.past_end = carry;
    }
    classify<Plan>(problem, tables, warp, box);
  } while (kMaskedColumns<Plan> && !box.past_end && box.present == 0);
  return box;
}

}  // namespace cuneigh::fused
