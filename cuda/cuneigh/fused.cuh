// What the fused kernels share: the boxes that a block works on, their tables in shared memory, and
// the copies between global and shared memory.
//
// A block keeps a box of rows and walks over boxes of columns. Forward and the gradient of query
// have queries for rows and keys for columns; the gradients of key and value have it the other way
// round (Plan::kRowsAreKeys), and walk the inverse windows.
#pragma once

#include "cuneigh/async.cuh"
#include "cuneigh/boxes.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"

namespace cuneigh {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused.py.
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
  int head_dim;
  int value_dim;
  int additional;        // number of additional keys
  int sign;              // of the scale: 1, 0 or -1
  float scale;           // its magnitude; 1 where the sign is 0
  float gradient_scale;  // the scale itself
};

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

template <typename Plan, typename Problem>
__device__ RowBox<Plan::kRank> row_box(const Problem& problem) {
  RowBox<Plan::kRank> box;
  unsigned block = blockIdx.x;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis& axis = problem.axes[r];
    const int length = Plan::kRowsAreKeys ? axis.key_length : axis.length;
    const int size = problem.warp_box[r] * problem.warps[r];
    box.first[r] = box_place(axis.dilation, length, block % problem.boxes[r], size);
    block /= problem.boxes[r];
  }
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

// Steps from the first column of a box to one of the others, in the memory of the two arrays that
// columns have, of their statistics and of rpb.
struct ColumnPlace {
  long long first, second;
  int statistics, bias;
};

// What does not depend on the box of columns.
template <typename Plan>
struct Tables {
  static constexpr int kRows = Plan::kWarps * Plan::kRowTiles * 16;

  unsigned long long before[Plan::kRank][Plan::kColumns + 1];  // bits of the columns of a box whose
                                                               // coordinate is less than an index
  ColumnPlace place[Plan::kColumns];
  Range reach[Plan::kRank];                // columns that the block meets
  Sight sight[Plan::kWarps][Plan::kRank];  // columns that every warp meets
  Range window[kRows][Plan::kRank];        // columns of a row; none where there is no row
  int token[kRows][Plan::kRank];           // -1 where there is no row
  int bias[kRows];                         // step in rpb
};

// A box of columns: of the window, or of the additional keys.
template <int kRank>
struct ColumnBox {
  int begin[kRank];           // group indices; the first of a box of additional keys
  unsigned long long exists;  // as bits, the columns that any row of the block may meet
  int head;
  bool additional;
};

// Sets `exists` of a box of columns.
template <typename Plan>
__device__ void bound(const FusedProblem<Plan::kRank>& problem, const Tables<Plan>& tables,
                      ColumnBox<Plan::kRank>& box) {
  box.exists = ~0ull;
  if (box.additional) {
    const int left = problem.additional - box.begin[0];
    if (left < 64) box.exists >>= 64 - left;
    return;
  }
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    box.exists &=
        tables.before[r][smaller(tables.reach[r].end - box.begin[r], problem.column_box[r])];
}

// The first box of columns.
template <typename Plan>
__device__ ColumnBox<Plan::kRank> first_columns(const FusedProblem<Plan::kRank>& problem,
                                                const RowBox<Plan::kRank>& rows,
                                                const Tables<Plan>& tables) {
  ColumnBox<Plan::kRank> box;
  box.additional = false;
  box.head = Plan::kRowsAreKeys ? rows.head * problem.group_size : rows.head / problem.group_size;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) box.begin[r] = tables.reach[r].begin;
  bound<Plan>(problem, tables, box);
  return box;
}

// Moves on to the next box of columns; false after the last. Those that cover the reach of the
// block come in raster order. After them come the additional keys of queries, and for keys the
// same walk in the next query head that shares them.
template <typename Plan>
__device__ bool advance(const FusedProblem<Plan::kRank>& problem, const Tables<Plan>& tables,
                        ColumnBox<Plan::kRank>& box) {
  if (box.additional) {
    box.begin[0] += Plan::kColumns;
  } else {
    int r = Plan::kRank - 1;
#pragma unroll
    for (int axis = Plan::kRank - 1; axis >= 0; --axis) {
      if (r == axis) {
        box.begin[axis] += problem.column_box[axis];
        if (box.begin[axis] >= tables.reach[axis].end) {
          box.begin[axis] = tables.reach[axis].begin;
          r = axis - 1;
        }
      }
    }
    if (r < 0) {
      if (Plan::kRowsAreKeys) {
        if (++box.head % problem.group_size == 0) return false;
      } else {
        box.additional = true;
        box.begin[0] = 0;
      }
    }
  }
  if (box.additional && box.begin[0] >= problem.additional) return false;
  bound<Plan>(problem, tables, box);
  return true;
}

template <typename Plan, typename First, typename Second, typename Statistics, typename Bias>
__device__ void fill_tables(const FusedProblem<Plan::kRank>& problem,
                            const RowBox<Plan::kRank>& rows, const First& first,
                            const Second& second, const Statistics& statistics, const Bias& rpb,
                            Tables<Plan>& tables) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  constexpr int kWarpRows = Plan::kRowTiles * 16;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;  // of a column's step in rpb
  if (threadIdx.x == 0) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const auto [group, begin] = rows.first[r];
      const int size = problem.warp_box[r] * problem.warps[r];
      const int last = smaller(begin + size, rows_of_group<Plan>(axis, group)) - 1;
      tables.reach[r] = {columns_of<Plan>(axis, begin, group).begin,
                         columns_of<Plan>(axis, last, group).end};
    }
  }

  // Rows: every warp takes a box of its own
  for (int row = threadIdx.x; row < Tables<Plan>::kRows; row += kThreads) {
    int in_warp = row % kWarpRows, warp = row / kWarpRows;
    bool exists = true;
    int index[kRank];
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int inside = r == 0 ? in_warp : in_warp % problem.warp_box[r];
      index[r] = rows.first[r].index + warp % problem.warps[r] * problem.warp_box[r] + inside;
      exists &= inside < problem.warp_box[r] &&
                index[r] < rows_of_group<Plan>(problem.axes[r], rows.first[r].group);
      in_warp /= problem.warp_box[r];
      warp /= problem.warps[r];
    }
    long long bias = 0;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int group = rows.first[r].group;
      tables.token[row][r] = exists ? axis.token({group, index[r]}) : -1;
      tables.window[row][r] = exists ? columns_of<Plan>(axis, index[r], group) : Range{0, 0};
      bias += (axis.kernel_size - 1 - kSign * index[r]) * rpb.token[r];
    }
    tables.bias[row] = int(bias);
  }

  // Columns: a box in raster order; places past its end belong to no row
  for (int place = threadIdx.x; place < Plan::kColumns; place += kThreads) {
    int rest = place;
    ColumnPlace steps = {};
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int coordinate = r == 0 ? rest : rest % problem.column_box[r];
      rest /= problem.column_box[r];
      const long long tokens = (long long)coordinate * problem.axes[r].dilation;
      steps.first += tokens * first.token[r];
      steps.second += tokens * second.token[r];
      steps.statistics += int(tokens * statistics.token[r]);
      steps.bias += int(kSign * coordinate * rpb.token[r]);
    }
    tables.place[place] = steps;
  }
  __syncthreads();

  // What the rows of every warp meet together
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
    for (int index = threadIdx.x; index <= problem.column_box[r]; index += kThreads) {
      const int bits = index * inner;
      const unsigned long long pattern = bits < 64 ? (1ull << bits) - 1 : ~0ull;
      unsigned long long before = 0;
      for (int start = 0; start < area; start += period) before |= pattern << start;
      tables.before[r][index] = before;
    }
    inner = period;
  }
}

// The element of an array that the first column of a box has.
template <typename Plan, typename Element>
__device__ Element* first_of(const FusedProblem<Plan::kRank>& problem,
                             const RowBox<Plan::kRank>& rows, const ColumnBox<Plan::kRank>& columns,
                             const View<Element, Plan::kRank>& view) {
  Element* first = view.at(rows.batch, columns.head);
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    first += problem.axes[r].token({rows.first[r].group, columns.begin[r]}) * view.token[r];
  return first;
}

// Copies the vectors of a box of columns; zeros stand for columns that no row meets. `kStep` names
// the member of ColumnPlace that leads from column to column; kExact promises dim == kDim.
template <int kDim, int kBytes, bool kExact, auto kStep, typename Plan, typename Element>
__device__ void load_columns(const FusedProblem<Plan::kRank>& problem,
                             const RowBox<Plan::kRank>& rows, const ColumnBox<Plan::kRank>& columns,
                             const View<const Element, Plan::kRank>& window,
                             const View<const Element, Plan::kRank>& additional, int dim,
                             const Tables<Plan>& tables,
                             Element (*columns_smem)[kPitchOf<Element, kDim>]) {
  constexpr int kThreads = Plan::kWarps * 32, kChunks = kDim / kChunk<Element>;
  const Element* first_column = columns.additional ? additional.at(rows.batch, columns.head) +
                                                         columns.begin[0] * additional.token[0]
                                                   : first_of<Plan>(problem, rows, columns, window);
#pragma unroll(kAsync ? 64 : 4)  // what is on its way takes registers where copies are not async
  for (int start = 0; start < Plan::kColumns * kChunks; start += kThreads) {
    const int i = start + threadIdx.x;
    if (Plan::kColumns * kChunks % kThreads && i >= Plan::kColumns * kChunks) break;
    const int column = i / kChunks, first = i % kChunks * kChunk<Element>;
    const long long step =
        columns.additional ? column * additional.token[0] : tables.place[column].*kStep;
    const int valid = kExact ? 16 : (dim - first) * int(sizeof(Element));
    copy_16_bytes<kBytes>(&columns_smem[column][first], first_column + step + first,
                          columns.exists >> column & 1 ? valid : 0);
  }
}

// Copies the vectors of the block's rows.
template <int kDim, int kBytes, typename Plan, typename Element, int kPitch>
__device__ void load_rows(const View<const Element, Plan::kRank>& view,
                          const RowBox<Plan::kRank>& rows, int dim, const Tables<Plan>& tables,
                          Element (*rows_smem)[kPitch]) {
  constexpr int kThreads = Plan::kWarps * 32, kChunks = kDim / kChunk<Element>;
#pragma unroll 4
  for (int i = threadIdx.x; i < Tables<Plan>::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, first = i % kChunks * kChunk<Element>;
    const auto& token = tables.token[row];
    const auto* source = view.at(rows.batch, token, rows.head) + first;
    copy_16_bytes<kBytes>(&rows_smem[row][first], source,
                          token[0] >= 0 ? (dim - first) * int(sizeof(Element)) : 0);
  }
}

// Gives a warp's rows the sign of the scale, so that the scale itself is positive.
template <int kDim, typename Plan, typename Element, int kPitch>
__device__ void sign_rows(const FusedProblem<Plan::kRank>& problem, Element (*rows_smem)[kPitch],
                          int warp, int lane) {
  constexpr int kRows = Plan::kRowTiles * 16;
  for (int i = lane; i < kRows * kDim; i += 32) {
    Element& element = rows_smem[warp * kRows + i / kDim][i % kDim];
    element = convert<Element>(float(problem.sign) * convert<float>(element));
  }
  __syncwarp();
}

enum class Visibility { kNone, kSome, kAll };

// How many of the pairs of a warp's rows with a box of columns are visible.
template <typename Plan>
__device__ Visibility visibility_of(const FusedProblem<Plan::kRank>& problem,
                                    const ColumnBox<Plan::kRank>& columns,
                                    const Tables<Plan>& tables, int warp) {
  bool all = columns.exists << (64 - Plan::kColumns) == ~0ull << (64 - Plan::kColumns);
  if (!columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Sight sight = tables.sight[warp][r];
      const int end = columns.begin[r] + problem.column_box[r];
      if (sight.misses(columns.begin[r], end)) return Visibility::kNone;
      all &= sight.covers(columns.begin[r], end);
    }
  }
  return all ? Visibility::kAll : Visibility::kSome;
}

// The columns that a row meets, as bits, shifted so that this lane's first column is bit 0.
template <typename Plan>
__device__ unsigned long long visible_columns(const FusedProblem<Plan::kRank>& problem,
                                              const ColumnBox<Plan::kRank>& columns,
                                              const Tables<Plan>& tables, int row, int lane) {
  unsigned long long visible = columns.exists;
  if (!columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Range window = tables.window[row][r];
      const int size = problem.column_box[r];
      const int begin = smaller(larger(window.begin - columns.begin[r], 0), size);
      const int end = smaller(larger(window.end - columns.begin[r], 0), size);
      visible &= tables.before[r][end] & ~tables.before[r][begin];
    }
  }
  return visible >> (lane % 4 * 2);
}

// Scales a row's logits to base 2 and adds the bias.
template <typename Plan>
__device__ void add_bias(const View<const typename Plan::Bias, Plan::kRank>& rpb,
                         const RowBox<Plan::kRank>& rows, const ColumnBox<Plan::kRank>& columns,
                         const Tables<Plan>& tables, int row, int half, int lane, float scale,
                         unsigned long long visible, float (&logit)[Plan::kColumns / 8][4]) {
  constexpr float kLog2E = 1.44269504f;
  constexpr int kSign = Plan::kRowsAreKeys ? -1 : 1;
  long long origin = tables.bias[row];
  if (!columns.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) origin += kSign * columns.begin[r] * rpb.token[r];
  }
  const auto* entry = rpb.at(0, Plan::kRowsAreKeys ? columns.head : rows.head) + origin;
#pragma unroll
  for (int n = 0; n < Plan::kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = logit[n][2 * half + i];
      x *= scale;
      if (!columns.additional && (visible >> (n * 8 + i) & 1))
        x += kLog2E * convert<float>(entry[tables.place[n * 8 + i + lane % 4 * 2].bias]);
    }
}

// Writes a warp's rows from shared memory in the widest packets that the alignment allows.
template <int kDim, int kBytes, typename Plan, typename Element, int kPitch>
__device__ void store_rows(const View<Element, Plan::kRank>& view, const RowBox<Plan::kRank>& rows,
                           int dim, const Tables<Plan>& tables, const Element (*rows_smem)[kPitch],
                           int warp, int lane) {
  constexpr int kRows = Plan::kRowTiles * 16, kWidth = kBytes / sizeof(Element);
  constexpr int kPackets = kDim / kWidth;
  struct alignas(kBytes) Packet {
    Element element[kWidth];
  };
#pragma unroll 4
  for (int i = lane; i < kRows * kPackets; i += 32) {
    const int row = warp * kRows + i / kPackets, first = i % kPackets * kWidth;
    const auto& token = tables.token[row];
    if (token[0] >= 0 && first < dim)
      *reinterpret_cast<Packet*>(view.at(rows.batch, token, rows.head) + first) =
          *reinterpret_cast<const Packet*>(&rows_smem[row][first]);
  }
}

}  // namespace cuneigh
