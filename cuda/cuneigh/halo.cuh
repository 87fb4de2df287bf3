// Small windows: a block brings what its rows meet to shared memory in slabs, boxes of columns that
// are whole along every axis but the first, mostly one slab that holds everything. Each warp picks
// out of a slab just the columns that its own sixteen rows meet, its list: ldmatrix takes an
// address for every column, so that picking costs nothing.
//
// Tables are the same for every batch entry, so a block works through several of them. (The
// launcher may let heads and batch entries change places.) They hold steps in memory in units of 16
// bytes, the width of every load and store here.
#pragma once

#include "cuneigh/async.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/mma.cuh"
#include "cuneigh/row_box.cuh"

namespace cuneigh {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/_halo.py.
template <int kRank>
struct HaloProblem {
  Axis axes[kRank];
  int warp_box[kRank];  // rows of a warp along each axis
  int warps[kRank];     // warps of a block along each axis
  int slab[kRank];      // columns of a slab along each axis
  int list[kRank];      // columns of a warp's list along each axis
  int pitch[kRank];     // bytes from column to column of a slab along each axis
  int boxes[kRank];     // boxes of rows along each axis, those of all dilation groups
  int batch;
  int part;  // batch entries that a block works through
  int heads;
  int group_size;  // query heads that share a key head
  float scale;     // positive
};

// Divides by multiplying; exact as long as number times divisor is less than 2^20.
struct Divisor {
  int divisor;
  unsigned inverse;

  __device__ explicit Divisor(int divisor)
      : divisor(divisor), inverse((1u << 20) / unsigned(divisor) + 1) {}
  __device__ int quotient(int x) const { return x * inverse >> 20; }
  __device__ int remainder(int x) const { return x - quotient(x) * divisor; }
};

// Where a column lies in a slab, in bytes, and the steps of its vectors; of queries, which have
// statistics, the step of those too, in elements.
template <bool kHasStatistics>
struct ColumnStep {
  unsigned target, first, second;
};
template <>
struct ColumnStep<true> {
  unsigned target, first, second, statistics;
};

template <typename Plan>
struct HaloTables {
  static constexpr int kRows = Plan::kWarps * 16;

  // Bits of the list whose coordinate along an axis is less than an index, axis after axis. A lane
  // has the columns 2 * (lane % 4) and the one after of every 8.
  unsigned below[Plan::kSides][4];
  int list[Plan::kColumns];                // bytes from the warp's first column in the slab on
  Range reach[Plan::kRank];                // columns that the block meets
  Range sight[Plan::kWarps][Plan::kRank];  // columns that a warp meets
  Range window[kRows][Plan::kRank];        // columns of a row; none where there is no row
  bool exists[kRows];
  RowBox<Plan::kRank> rows;
  int places;  // columns of a slab
  int slab_bytes;
  long long start[3];  // elements from a batch entry to the block's first column, in three arrays
};

// The dynamic shared memory: tables, kBuffers times the block's rows and a slab, and the steps of a
// slab's columns. `kRowDim` elements of a row are kept. The two vectors of a column are neighbors,
// so that one address serves both.
template <typename Plan, int kRowDim>
struct HaloMemory {
  using Element = typename Plan::Element;
  static_assert(sizeof(HaloTables<Plan>) == Plan::kTableBytes,
                "'table_bytes' in cuneigh/_halo_plan.py counts what HaloTables holds");

  HaloTables<Plan> tables;
  alignas(16) Element row[Plan::kBuffers][HaloTables<Plan>::kRows][kPitchOf<Element, kRowDim>];
  alignas(16) char slab[1];

  __device__ char* column(int buffer, unsigned bytes) {
    return slab + (Plan::kBuffers == 1 ? 0 : buffer * tables.slab_bytes) + bytes;
  }
  __device__ ColumnStep<Plan::kRowsAreKeys>* steps() {
    return reinterpret_cast<ColumnStep<Plan::kRowsAreKeys>*>(
        column(Plan::kBuffers - 1, tables.slab_bytes));
  }
};

// `count` times 16 bytes from a pointer on, in one instruction.
template <typename Element>
__device__ Element* step_by(Element* pointer, unsigned count) {
  unsigned long long address = reinterpret_cast<unsigned long long>(pointer);
  asm("mad.wide.u32 %0, %1, 16, %0;" : "+l"(address) : "r"(count));
  pointer = reinterpret_cast<Element*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// The step in an array from the token at 0 on.
template <int kUnit, typename Element, int kRank>
__device__ unsigned step_to(const View<Element, kRank>& view, const int (&token)[kRank]) {
  long long step = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) step += token[r] * view.token[r];
  return unsigned(step / kUnit);
}

// Fills all but `start`, and calls keep(row, token) for every row, with a valid token also where
// there is no row.
template <typename Plan, typename Keep>
__device__ void fill_tables(const HaloProblem<Plan::kRank>& problem, HaloTables<Plan>& tables,
                            Keep keep) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  const int lane = threadIdx.x % 32;
  const RowBox<kRank> rows = row_box<Plan>(problem);
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    if (threadIdx.x != r) continue;
    const Axis& axis = problem.axes[r];
    const auto [group, begin] = rows.first[r];
    const int size = problem.warp_box[r] * problem.warps[r];
    const int last = smaller(begin + size, rows_of_group<Plan>(axis, group)) - 1;
    tables.reach[r] = {columns_of<Plan>(axis, begin, group).begin,
                       columns_of<Plan>(axis, last, group).end};
  }

  // Rows: every warp takes a box of its own
  if (threadIdx.x < HaloTables<Plan>::kRows) {
    const int row = threadIdx.x;
    int in_warp = row % 16, warp = row / 16, index[kRank], token[kRank];
    bool exists = true;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int size = problem.warp_box[r];
      const Divisor box(size), warps(problem.warps[r]);
      const int inside = r == 0 ? in_warp : box.remainder(in_warp);
      const int length = rows_of_group<Plan>(problem.axes[r], rows.first[r].group);
      index[r] = rows.first[r].index + warps.remainder(warp) * size + inside;
      exists &= inside < size && index[r] < length;
      index[r] = smaller(index[r], length - 1);
      in_warp = box.quotient(in_warp);
      warp = warps.quotient(warp);
    }
    tables.exists[row] = exists;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int group = rows.first[r].group;
      const Range window = columns_of<Plan>(axis, index[r], group);
      token[r] = axis.token({group, index[r]});
      tables.window[row][r] = exists ? window : Range{0, 0};
      int begin = exists ? window.begin : 1 << 30, end = exists ? window.end : 0;
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        begin = smaller(begin, __shfl_xor_sync(0xffffffffu, begin, step));
        end = larger(end, __shfl_xor_sync(0xffffffffu, end, step));
      }
      tables.sight[row / 16][r] = {begin, end};
    }
    keep(row, token);
  }

  // The list in raster order; its places past the end repeat the first
  int area = 1, places = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    area *= problem.list[r];
    places *= problem.slab[r];
  }
#pragma unroll 1
  for (int column = threadIdx.x; column < Plan::kColumns; column += kThreads) {
    int rest = column, bytes = 0;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Divisor size(problem.list[r]);
      bytes += (r == 0 ? rest : size.remainder(rest)) * problem.pitch[r];
      rest = size.quotient(rest);
    }
    tables.list[column] = column < area ? bytes : 0;
  }
  if (threadIdx.x == 0) {
    tables.rows = rows;
    tables.places = places;
    tables.slab_bytes = problem.slab[0] * problem.pitch[0];
  }

  // A ballot gathers the bits of one quarter
  int inner = area, first = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int size = problem.list[r];
    inner = Divisor(size).quotient(inner);
    const Divisor by_inner(inner), by_size(size);
    int coordinate[4];
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int column = lane / 2 * 8 + quarter * 2 + lane % 2;
      coordinate[quarter] = column < area ? by_size.remainder(by_inner.quotient(column)) : size;
    }
#pragma unroll 1
    for (int index = threadIdx.x / 32; index <= size; index += Plan::kWarps)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const unsigned bits = __ballot_sync(0xffffffffu, coordinate[quarter] < index);
        if (lane == 0) tables.below[first + index][quarter] = bits;
      }
    first += size + 1;
  }
}

// Elements from a batch entry to the first column of the block.
template <typename Plan, typename Array>
__device__ long long start_of(const HaloProblem<Plan::kRank>& problem, const Array& view,
                              const HaloTables<Plan>& tables) {
  const auto& rows = tables.rows;
  const int head =
      Plan::kRowsAreKeys ? rows.head * problem.group_size : rows.head / problem.group_size;
  long long start = head * view.head;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    start += problem.axes[r].token({rows.first[r].group, tables.reach[r].begin}) * view.token[r];
  return start;
}

// Fills `start` and the steps of columns. Places past the reach of the block repeat its last ones.
template <typename Plan, int kRowDim, typename First, typename Second, typename Statistics>
__device__ void fill_steps(const HaloProblem<Plan::kRank>& problem, const First& first,
                           const Second& second, const Statistics& statistics,
                           HaloMemory<Plan, kRowDim>& smem) {
  constexpr int kRank = Plan::kRank;
  auto& tables = smem.tables;
  if (threadIdx.x == 0) tables.start[0] = start_of<Plan>(problem, first, tables);
  if (threadIdx.x == 32) tables.start[1] = start_of<Plan>(problem, second, tables);
  if (threadIdx.x == 64) tables.start[2] = start_of<Plan>(problem, statistics, tables);
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.places; i += Plan::kWarps * 32) {
    int rest = i, tokens[kRank];
    unsigned target = 0;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Divisor size(problem.slab[r]);
      const Range reach = tables.reach[r];
      const int coordinate = r == 0 ? rest : size.remainder(rest);
      target += coordinate * problem.pitch[r];
      tokens[r] = smaller(coordinate, reach.end - 1 - reach.begin) * problem.axes[r].dilation;
      rest = size.quotient(rest);
    }
    auto& step = smem.steps()[i];
    step.target = target;
    step.first = step_to<8>(first, tokens);
    step.second = step_to<8>(second, tokens);
    if constexpr (Plan::kRowsAreKeys) step.statistics = step_to<1>(statistics, tokens);
  }
}

// One slab of one batch entry. The last of several begins early, so as to end with the reach: the
// columns before `begin` were in the slab before.
struct Slab {
  int batch;
  int member;       // the column's head among those that share the row's
  int base, begin;  // group indices along the first axis
};

template <typename Plan>
__device__ Slab first_slab(const HaloProblem<Plan::kRank>& problem,
                           const HaloTables<Plan>& tables) {
  const int begin = tables.reach[0].begin;
  return {tables.rows.batch * problem.part, 0, begin, begin};
}

// Moves on to the next slab; false after the last.
template <typename Plan>
__device__ bool advance(const HaloProblem<Plan::kRank>& problem, const HaloTables<Plan>& tables,
                        Slab& slab) {
  const Range reach = tables.reach[0];
  slab.begin += problem.slab[0];
  slab.base = smaller(slab.begin, larger(reach.end - problem.slab[0], reach.begin));
  if (slab.begin < reach.end) return true;
  slab.base = slab.begin = reach.begin;
  if (Plan::kRowsAreKeys) {
    if (++slab.member < problem.group_size) return true;
    slab.member = 0;
  }
  return ++slab.batch < smaller((tables.rows.batch + 1) * problem.part, problem.batch);
}

// The element of an array that the first column of a slab has.
template <int kArray, typename Plan, typename Element>
__device__ Element* first_of(const HaloProblem<Plan::kRank>& problem, const Slab& slab,
                             const View<Element, Plan::kRank>& view,
                             const HaloTables<Plan>& tables) {
  const int tokens = (slab.base - tables.reach[0].begin) * problem.axes[0].dilation;
  Element* first =
      view.data + tables.start[kArray] + slab.batch * view.batch + tokens * view.token[0];
  return Plan::kRowsAreKeys ? first + slab.member * view.head : first;
}

// Copies one vector of every column of a slab, the first or the second, to `slab_smem`.
template <int kDim, int kArray, typename Plan, int kRowDim, typename Element>
__device__ void load_slab(const HaloProblem<Plan::kRank>& problem, const Slab& slab,
                          const View<const Element, Plan::kRank>& view,
                          HaloMemory<Plan, kRowDim>& smem, const void* slab_smem) {
  constexpr int kChunks = kDim / 8, kStride = Plan::kWarps * 32 / kChunks, kUnroll = 4;
  const int chunk = threadIdx.x % kChunks * 8, first = threadIdx.x / kChunks;
  const Element* source = first_of<kArray, Plan>(problem, slab, view, smem.tables) + chunk;
  const unsigned target = shared_address(slab_smem) + chunk * sizeof(Element);
  const auto* step = smem.steps() + first;
#pragma unroll 1
  for (int left = smem.tables.places - first; left > 0; left -= kUnroll * kStride) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (i * kStride < left) {
        const auto& column = step[i * kStride];
        copy_16_bytes(target + column.target,
                      step_by(source, kArray ? column.second : column.first));
      }
    step += kUnroll * kStride;
  }
}

// A warp's list in a slab.
struct List {
  int begin;            // that of the slab
  bool meets;           // whether the warp meets anything in it
  unsigned first;       // bytes to the first column
  unsigned visible[2];  // columns that the lane's rows lane / 4 and lane / 4 + 8 meet, as bits
};

template <typename Plan>
__device__ List list_of(const HaloProblem<Plan::kRank>& problem, const Slab& slab,
                        const HaloTables<Plan>& tables, int warp, int lane) {
  List result = {slab.begin, true, 0, {~0u, ~0u}};
  int table = 0;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    Range sight = tables.sight[warp][r];
    const int size = problem.slab[r], list = problem.list[r];
    int base = tables.reach[r].begin;
    if (r == 0) {
      base = slab.base;
      sight = {larger(sight.begin, slab.begin), smaller(sight.end, slab.begin + size)};
    }
    result.meets &= sight.begin < sight.end;
    const int start = smaller(larger(sight.begin - base, 0), size - list);
    result.first += start * problem.pitch[r];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range window = tables.window[warp * 16 + half * 8 + lane / 4][r];
      const int begin = r == 0 ? larger(window.begin, slab.begin) : window.begin;
      const int low = smaller(larger(begin - base - start, 0), list);
      const int high = smaller(larger(window.end - base - start, 0), list);
      result.visible[half] &=
          tables.below[table + high][lane % 4] & ~tables.below[table + low][lane % 4];
    }
    table += list + 1;
  }
  return result;
}

// Copies one vector of each of a warp's rows, to `offset` in the rows.
template <int kDim, auto kStep, typename Step, typename Element, int kPitch>
__device__ void load_rows(const Element* source, const Step* step, int lane,
                          Element (*rows_smem)[kPitch], int offset) {
  constexpr int kChunks = kDim / 8;
  const int chunk = lane % kChunks * 8;
#pragma unroll
  for (int row = lane / kChunks; row < 16; row += 32 / kChunks)
    copy_16_bytes(shared_address(&rows_smem[row][offset + chunk]),
                  step_by(source + chunk, step[row].*kStep));
}

// Sixteen elements from `first` on of a warp's rows, as the left operand of a product.
template <typename Element, int kPitch>
__device__ void take_rows(const Element (*rows_smem)[kPitch], int first, int lane,
                          unsigned (&operand)[4]) {
  ldmatrix_x4(operand, shared_address(&rows_smem[lane % 16][first + lane / 16 * 8]));
}

// Word t of lane q to word q of lane t, among four lanes.
__device__ inline void transpose(unsigned (&word)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const unsigned received =
          __shfl_xor_sync(0xffffffffu, upper ? word[i] : word[i + step], step);
      word[i] = upper ? received : word[i];
      word[i + step] = upper ? word[i + step] : received;
    }
  }
}

// Writes a row of sums times `factor`, `half` saying which of the lane's two, if it exists.
template <int kDim, typename Element>
__device__ void store_row(const float (&sum)[kDim / 8][4], int half, float factor, bool exists,
                          int lane, Element* row) {
#pragma unroll
  for (int d = 0; d < kDim; d += 32) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] =
          pack(sum[d / 8 + i][2 * half] * factor, sum[d / 8 + i][2 * half + 1] * factor, Element());
    transpose(word, lane);
    if (exists)
      *reinterpret_cast<uint4*>(row + d + lane % 4 * 8) =
          make_uint4(word[0], word[1], word[2], word[3]);
  }
}

}  // namespace cuneigh
