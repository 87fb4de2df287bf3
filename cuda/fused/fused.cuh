// How the fused kernels walk: a block keeps a box of rows (row_box.cuh) and goes over the boxes of
// columns that they meet, in one entry after another: an entry is a head of the rows in one element
// of the batch. Tables in shared memory hold all that does not change on the way.
#pragma once

#include "cuneigh/boxes.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "fused/row_box.cuh"

namespace cuneigh::fused {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused/__init__.py.
template <int kRank>
struct FusedProblem {
  Axis axes[kRank];
  int warp_box[kRank];    // rows of a warp along each axis
  int warps[kRank];       // warps of a block along each axis
  int column_box[kRank];  // columns of a box along each axis
  int boxes[kRank];       // boxes of rows along each axis, those of all dilation groups
  int batch;
  int heads;
  int group_size;  // query heads that share a key head
  int part;        // entries that a block works through
  int head_dim;
  int value_dim;
  int additional;        // number of additional keys
  int sign;              // of the scale: 1, 0 or -1
  float scale;           // its magnitude times log2(e); log2(e) where the sign is 0
  float gradient_scale;  // the scale itself
};

// Steps from the first column of a box to one of the others: in bytes in the two arrays of columns,
struct alignas(16) ColumnSteps {
  long long first, second;
};
// and in elements in their statistics and rpb.
struct ScalarSteps {
  int statistics, bias;
};

// A head of the rows in one element of the batch.
struct Entry {
  int batch, head;
};

enum class Visibility { kNone, kSome, kAll };

// A box of columns: of the window, or of the additional keys.
template <typename Plan>
struct alignas(16) ColumnBox {
  const typename Plan::Element *first, *second;  // the first column in the two arrays
  const float2* statistics;                      // its statistics, where the columns are queries
  unsigned long long exists;  // as bits, the columns that any row of the block may meet
  int begin[Plan::kRank];     // group indices; the first of a box of additional keys
  int batch, head;            // of the queries
  bool additional;
  bool past_end;          // there is no such box: the walk is over
  Visibility visibility;  // to the rows of a warp
};

// What does not depend on the box of columns, and two boxes of each warp's walk.
template <typename Plan>
struct Tables {
  static constexpr int kRows = Plan::kWarps * Plan::kRowTiles * 16;

  // What a walk reads of each step comes first, so that it is aligned for wide loads
  ColumnBox<Plan> walk[Plan::kWarps][2];
  Sight sight[Plan::kWarps][Plan::kRank];                      // columns that every warp meets
  ColumnSteps steps[1 + Plan::kAdditional][Plan::kColumns];    // in a window; among additional keys
  Range reach[Plan::kRank];                                    // columns that the block meets
  Place first[Plan::kRank];                                    // of the rows
  unsigned long long before[Plan::kRank][Plan::kColumns + 1];  // bits of the columns of a box whose
                                                               // coordinate is less than an index
  unsigned long long visible[kRows];  // bits of the columns of the box at hand
  ScalarSteps scalar_steps[Plan::kColumns];
  Range window[kRows][Plan::kRank];  // columns of a row; none where there is no row
  int token[kRows][Plan::kRank];     // -1 where there is no row
  int bias[kRows];                   // step in rpb
  int share;                         // which of the blocks with these rows this is
};

// The arrays of the columns.
template <typename Plan>
struct Columns {
  using Const = View<const typename Plan::Element, Plan::kRank>;
  const Const &first, &second, &additional_first, &additional_second;
  const View<const float2, Plan::kRank>& statistics;
};

// This thread's number in its block, in a register of its own: the compiler takes threadIdx.x for
// cheap and reads it again wherever it is used, but each time takes dozens of cycles.
__device__ inline int thread_of_block() { return __shfl_xor_sync(0xffffffffu, threadIdx.x, 0); }

// The same number to the compiler's eye a new one: what a loop makes of it is then not kept in
// registers from round to round.
__device__ inline int renewed(int thread) {
  asm volatile("" : "+r"(thread));
  __builtin_assume(thread >= 0);
  return thread;
}

// A block's dynamic shared memory, its address in a register for the same reason. It starts with a
// whole line (vectors.cuh).
template <typename Smem>
__device__ Smem& dynamic_smem() {
  extern __shared__ __align__(128) char memory_smem[];
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(memory_smem));
  address = __shfl_xor_sync(0xffffffffu, address, 0);
  return *reinterpret_cast<Smem*>(__cvta_shared_to_generic(address));
}

// The head of a box of columns.
template <typename Plan>
__device__ int column_head(const FusedProblem<Plan::kRank>& problem,
                           const ColumnBox<Plan>& columns) {
  return Plan::kRowsAreKeys ? columns.head : columns.head / problem.group_size;
}

// The element of an array that the first column of a box has.
template <typename Plan, typename Element>
__device__ Element* first_of(const FusedProblem<Plan::kRank>& problem, const Tables<Plan>& tables,
                             const ColumnBox<Plan>& columns,
                             const View<Element, Plan::kRank>& view) {
  Element* first = view.at(columns.batch, column_head(problem, columns));
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    first += problem.axes[r].token({tables.first[r].group, columns.begin[r]}) * view.token[r];
  return first;
}

// Sets what exists of a box of columns and what a warp sees of it.
template <typename Plan>
__device__ void look(const FusedProblem<Plan::kRank>& problem, const Tables<Plan>& tables, int warp,
                     ColumnBox<Plan>& box) {
  constexpr unsigned long long kAll = ~0ull >> (64 - Plan::kColumns);
  if (Plan::kAdditional && box.additional) {
    const int left = problem.additional - box.begin[0];
    box.past_end = left <= 0;
    box.exists = left < Plan::kColumns ? ~(~0ull << larger(left, 0)) : kAll;
    box.visibility = box.exists == kAll ? Visibility::kAll : Visibility::kSome;
    return;
  }
  box.exists = kAll;
  bool any = true, all = true;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    const int begin = box.begin[r], end = begin + problem.column_box[r];
    box.exists &= tables.before[r][smaller(tables.reach[r].end - begin, problem.column_box[r])];
    const Sight sight = tables.sight[warp][r];
    any &= !sight.misses(begin, end);
    all &= sight.covers(begin, end);
  }
  all &= box.exists == kAll;
  box.visibility = !any ? Visibility::kNone : all ? Visibility::kAll : Visibility::kSome;
}

// The first box of columns of an entry.
template <typename Plan>
__device__ ColumnBox<Plan> first_columns(const FusedProblem<Plan::kRank>& problem,
                                         const Columns<Plan>& arrays, const Tables<Plan>& tables,
                                         int warp, Entry entry) {
  ColumnBox<Plan> box;
  box.additional = box.past_end = false;
  box.batch = entry.batch;
  box.head = Plan::kRowsAreKeys ? entry.head * problem.group_size : entry.head;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) box.begin[r] = tables.reach[r].begin;
  box.first = first_of(problem, tables, box, arrays.first);
  box.second = first_of(problem, tables, box, arrays.second);
  if (Plan::kRowsAreKeys) box.statistics = first_of(problem, tables, box, arrays.statistics);
  look<Plan>(problem, tables, warp, box);
  return box;
}

// The box of columns after another. Those that cover the reach of the block come in raster order.
// After them come the additional keys of queries, and for keys the same walk in the next query head
// that shares them.
template <typename Plan>
__device__ ColumnBox<Plan> next_columns(const FusedProblem<Plan::kRank>& problem,
                                        const Columns<Plan>& arrays, const Tables<Plan>& tables,
                                        int warp, ColumnBox<Plan> box) {
  const bool in_window = !Plan::kAdditional || !box.additional;
  bool carry = in_window;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Range reach = tables.reach[r];
    int begin = box.begin[r] + problem.column_box[r];
    const bool over = begin >= reach.end;
    begin = over ? reach.begin : begin;
    const long long steps =
        carry ? (begin - box.begin[r]) * (long long)problem.axes[r].dilation : 0;
    box.first += steps * arrays.first.token[r];
    box.second += steps * arrays.second.token[r];
    if (Plan::kRowsAreKeys) box.statistics += steps * arrays.statistics.token[r];
    box.begin[r] = carry ? begin : box.begin[r];
    carry &= over;
  }
  if (Plan::kRowsAreKeys) {
    if (carry) {
      ++box.head;
      box.first += arrays.first.head;
      box.second += arrays.second.head;
      box.statistics += arrays.statistics.head;
      box.past_end = box.head % problem.group_size == 0;
    }
  } else if (Plan::kAdditional) {
    if (carry) {
      const int head = column_head(problem, box);
      box.additional = true;
      box.begin[0] = 0;
      box.first = arrays.additional_first.at(box.batch, head);
      box.second = arrays.additional_second.at(box.batch, head);
    } else if (!in_window) {
      box.begin[0] += Plan::kColumns;
      box.first += Plan::kColumns * arrays.additional_first.token[0];
      box.second += Plan::kColumns * arrays.additional_second.token[0];
    }
  } else {
    box.past_end = carry;
  }
  look<Plan>(problem, tables, warp, box);
  return box;
}

template <typename Plan, typename Bias>
__device__ void fill_tables(const FusedProblem<Plan::kRank>& problem, const Columns<Plan>& arrays,
                            const Bias& rpb, Tables<Plan>& tables, int thread) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  constexpr int kWarpRows = Plan::kRowTiles * 16;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;  // of a column's step in rpb
  Place first[kRank];
  const int share = find_rows<Plan>(problem, first);
  if (thread == 0) {
    tables.share = share;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const auto [group, begin] = tables.first[r] = first[r];
      const int size = problem.warp_box[r] * problem.warps[r];
      const int last = smaller(begin + size, rows_of_group<Plan>(axis, group)) - 1;
      tables.reach[r] = {columns_of<Plan>(axis, begin, group).begin,
                         columns_of<Plan>(axis, last, group).end};
    }
  }

  // Rows: every warp takes a box of its own
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
      tables.window[row][r] = exists ? columns_of<Plan>(axis, index[r], group) : Range{0, 0};
      bias += (axis.kernel_size - 1 - kSign * index[r]) * rpb.token[r];
    }
    tables.bias[row] = int(bias);
  }

  // Columns: a box in raster order; places past its end belong to no row
  for (int place = thread; place < Plan::kColumns; place += kThreads) {
    int rest = place;
    ColumnSteps steps = {};
    ScalarSteps scalar_steps = {};
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int coordinate = r == 0 ? rest : rest % problem.column_box[r];
      rest /= problem.column_box[r];
      const long long tokens = (long long)coordinate * problem.axes[r].dilation;
      steps.first += tokens * arrays.first.token[r];
      steps.second += tokens * arrays.second.token[r];
      scalar_steps.statistics += int(tokens * arrays.statistics.token[r]);
      scalar_steps.bias += int(kSign * coordinate * rpb.token[r]);
    }
    constexpr int kBytes = sizeof(typename Plan::Element);
    tables.steps[0][place] = {steps.first * kBytes, steps.second * kBytes};
    if (Plan::kAdditional)
      tables.steps[1][place] = {place * arrays.additional_first.token[0] * kBytes,
                                place * arrays.additional_second.token[0] * kBytes};
    tables.scalar_steps[place] = scalar_steps;
  }
  __syncthreads();

  // What the rows of every warp meet together
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    Sight sight = Sight::nothing();
    for (int row = warp * kWarpRows + lane; row < (warp + 1) * kWarpRows; row += 32)
      if (tables.token[row][0] >= 0) sight.add(tables.window[row][r]);
    sight = sight.of_warp();
    if (lane == 0) tables.sight[warp][r] = sight;
  }

  // In raster order an axis repeats its pattern for every coordinate of the axes before it
  int inner = 1;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int period = inner * problem.column_box[r];
    int area = 1;
#pragma unroll
    for (int other = 0; other < kRank; ++other) area *= problem.column_box[other];
    for (int index = thread; index <= problem.column_box[r]; index += kThreads) {
      const int bits = index * inner;
      const unsigned long long pattern = bits < 64 ? (1ull << bits) - 1 : ~0ull;
      unsigned long long before = 0;
      for (int start = 0; start < area; start += period) before |= pattern << start;
      tables.before[r][index] = before;
    }
    inner = period;
  }
}

}  // namespace cuneigh::fused
