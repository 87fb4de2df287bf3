// Small windows: a block brings what its rows meet to shared memory in slabs, boxes of columns that
// are whole along every axis but the first, mostly one slab that holds everything. Each warp picks
// out of a slab just the columns that its own sixteen rows meet, its list: ldmatrix takes an
// address for every column, so that picking costs nothing.
//
// Tables are the same for every batch entry, so a block works through several of them. (The
// launcher may let heads and batch entries change places.) They hold steps in memory, of 16 bytes
// in vectors and of one element in statistics, which 32 bits are enough for.
#pragma once

#include "cuneigh/layout.cuh"
#include "fused/async.cuh"
#include "fused/mma.cuh"
#include "fused/row_box.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused::small {

// A number to divide by, by multiplying: exact where it times the number divided is less than 2^20.
struct Divisor {
  int divisor;
  unsigned inverse;  // 2^20 / divisor, rounded up

  __device__ operator int() const { return divisor; }
  __device__ int quotient(int x) const { return x * inverse >> 20; }
  __device__ int remainder(int x) const { return x - quotient(x) * divisor; }
};

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused/small/launch.py.
template <int kRank>
struct HaloProblem {
  Axis axes[kRank];
  Divisor warp_box[kRank];  // rows of a warp along each axis
  Divisor warps[kRank];     // warps of a block along each axis
  Divisor slab[kRank];      // columns of a slab along each axis
  Divisor list[kRank];      // columns of a warp's list along each axis
  int boxes[kRank];         // boxes of rows along each axis, those of all dilation groups
  int batch;
  int part;  // batch entries that a block works through
  int heads;
  int group_size;        // query heads that share a key head
  float scale;           // times log2(e); positive
  float gradient_scale;  // the scale itself
};

// A column is whole lines of 128 bytes: its first vector, then the second. The chunks of 16 bytes
// in a line change places, chunk i with chunk i ^ phase, where eight columns that follow each other
// in a list have different phases: the same chunk of all of them is read from different banks, and
// copies fill lines.
template <typename Plan>
constexpr int kColumnBytes = (Plan::kHeadDim + Plan::kValueDim + 63) / 64 * 128;

// The address of a chunk in a column; `place` is that of the column plus 16 times its phase.
__device__ inline unsigned chunk_of(unsigned place, int chunk) {
  return (place + chunk / 8 * 128) ^ chunk % 8 * 16;
}

// A column's place in a slab, as `chunk_of` takes it, and the steps of its vectors; where columns
// are queries, the step of their statistics, too, in elements.
struct alignas(16) ColumnStep {
  unsigned place, first, second, statistics;
};

// Where a block finds an array in the first batch entry, and the steps to the next entry, to the
// next head and along the first axis.
template <typename Element>
struct Origin {
  Element* data;
  unsigned batch, head, line;
};

// A lane's columns of a list as bits: 2 * (lane % 4) and the one after of every 8.
template <bool kLong>
struct BitsOf {
  using Type = unsigned;
};
template <>
struct BitsOf<true> {
  using Type = unsigned long long;
};
template <typename Plan>
using Bits = typename BitsOf<(Plan::kColumns > 128)>::Type;

// Those that each of the lane's rows lane / 4 and lane / 4 + 8 meets.
template <typename Plan>
struct alignas(2 * sizeof(Bits<Plan>)) Visible {
  Bits<Plan> row[2];
};

template <typename Plan>
struct HaloTables {
  using Element = typename Plan::Element;
  static constexpr int kRows = Plan::kWarps * 16;

  // The columns of a list whose coordinate along an axis is less than an index, axis after axis
  // from the second on, of those that each of four lanes has.
  Bits<Plan> below[Plan::kSides][4];
  int list[Plan::kColumns];                // bytes from the warp's first column in the slab on;
                                           // places past the end repeat some of the first eight
  Range reach[Plan::kRank];                // columns that the block meets
  Range sight[Plan::kWarps][Plan::kRank];  // columns that a warp meets
  Range window[kRows][Plan::kRank];        // columns of a row; none where there is no row
  bool exists[kRows];
  RowBox<Plan::kRank> rows;
  int places;  // columns of a slab
  int slab_bytes;
  int slabs;                            // that the reach of the block is cut into
  Origin<const Element> first, second;  // the block's first column
  Origin<float2> statistics;
};

constexpr unsigned kNothing = ~0u;

// The dynamic shared memory: tables, kBuffers times the block's rows and a slab, the steps of a
// slab's columns, their statistics where they are queries, and the lists of every slab. `kRowDim`
// elements of a row are kept.
template <typename Plan, int kRowDim>
struct HaloMemory {
  using Element = typename Plan::Element;
  static_assert(
      sizeof(HaloTables<Plan>) == Plan::kTableBytes,
      "'table_bytes' in cuneigh/_backends/fused/small/plan.py counts what HaloTables holds");

  HaloTables<Plan> tables;
  alignas(128) Element row[Plan::kBuffers][HaloTables<Plan>::kRows][kVectorPitch<Element, kRowDim>];
  alignas(128) char slab[1];

  __device__ unsigned slab_of(int buffer) {
    return shared_address(slab) + (Plan::kBuffers == 1 ? 0 : buffer * tables.slab_bytes);
  }
  __device__ ColumnStep* steps() {
    return reinterpret_cast<ColumnStep*>(slab + Plan::kBuffers * tables.slab_bytes);
  }
  __device__ float2* statistics() { return reinterpret_cast<float2*>(steps() + tables.places); }
  // Of a warp's list in a slab: what a lane's rows meet, and the place of its first column in the
  // slab, or kNothing if no row meets any
  __device__ Visible<Plan>& visible(int slab, int warp, int lane) {
    auto* lists =
        reinterpret_cast<Visible<Plan>*>(statistics() + (Plan::kRowsAreKeys ? tables.places : 0));
    return lists[(slab * Plan::kWarps + warp) * 32 + lane];
  }
  __device__ unsigned& first(int slab, int warp) {
    auto* lists = reinterpret_cast<unsigned*>(&visible(tables.slabs, 0, 0));
    return lists[slab * Plan::kWarps + warp];
  }
};

template <typename Element>
constexpr int kStep = sizeof(Element) == 2 ? 8 : 1;  // elements

// The element that is `count` steps away: 32 bits times a constant, no product of 64 bits.
template <typename Element>
__device__ Element* step_by(Element* pointer, unsigned count) {
  unsigned long long address = reinterpret_cast<unsigned long long>(pointer);
  asm("mad.wide.u32 %0, %1, %2, %0;"
      : "+l"(address)
      : "r"(count), "n"(kStep<Element> * int(sizeof(Element))));
  pointer = reinterpret_cast<Element*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Steps in an array from the token at 0 on. They are positive, and 32 bits hold them all.
template <typename Element, int kRank>
__device__ unsigned steps_to(const View<Element, kRank>& view, const int (&token)[kRank]) {
  unsigned steps = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    steps += token[r] * unsigned((unsigned long long)view.token[r] / kStep<Element>);
  return steps;
}

// The origin of the rows' array.
template <typename Element, int kRank>
__device__ Origin<Element> origin_of(const View<Element, kRank>& view, int head) {
  return {view.at(0, head), unsigned(view.batch / kStep<Element>), 0, 0};
}

template <typename Element>
__device__ Element* entry_of(const Origin<Element>& origin, int batch) {
  return step_by(origin.data, batch * origin.batch);
}

// Columns of a list that have the same coordinate along the first axis.
template <int kRank>
__device__ int inner_of(const HaloProblem<kRank>& problem) {
  int inner = 1;
#pragma unroll
  for (int r = 1; r < kRank; ++r) inner *= problem.list[r];
  return inner;
}

// Fills all but what `fill_steps` does, and calls keep(row, token) for every row, with a valid
// token also where there is no row.
template <typename Plan, typename Keep>
__device__ void fill_tables(const HaloProblem<Plan::kRank>& problem, HaloTables<Plan>& tables,
                            Keep keep) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  const int lane = threadIdx.x % 32;
  const RowBox<kRank> rows = row_box<Plan>(problem);
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    if (threadIdx.x != kThreads - 32 * (r + 1)) continue;  // warps that mostly have no rows below
    const Axis& axis = problem.axes[r];
    const auto [group, begin] = rows.first[r];
    const int size = problem.warp_box[r] * problem.warps[r];
    const int last = smaller(begin + size, rows_of_group<Plan>(axis, group)) - 1;
    const Range reach = {columns_of<Plan>(axis, begin, group).begin,
                         columns_of<Plan>(axis, last, group).end};
    tables.reach[r] = reach;
    if (r == 0)
      tables.slabs = Plan::kWhole ? 1 : ceil_div(reach.end - reach.begin, problem.slab[0]);
  }

  // Rows: every warp takes a box of its own
  if (threadIdx.x < HaloTables<Plan>::kRows) {
    const int row = threadIdx.x;
    int in_warp = row % 16, warp = row / 16, index[kRank], token[kRank];
    bool exists = true;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Divisor box = problem.warp_box[r], warps = problem.warps[r];
      const int inside = r == 0 ? in_warp : box.remainder(in_warp);
      const int length = rows_of_group<Plan>(problem.axes[r], rows.first[r].group);
      index[r] = rows.first[r].index + (r == 0 ? warp : warps.remainder(warp)) * box + inside;
      exists &= inside < box && index[r] < length;
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

  // The list in raster order
  const int area = problem.list[0] * inner_of(problem);
#pragma unroll 1
  for (int column = threadIdx.x; column < Plan::kColumns; column += kThreads) {
    int rest = column < area ? column : column % 8, bytes = 0, pitch = kColumnBytes<Plan>;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Divisor list = problem.list[r];
      bytes += (r == 0 ? rest : list.remainder(rest)) * pitch;
      rest = list.quotient(rest);
      pitch *= problem.slab[r];
    }
    tables.list[column] = bytes;
  }
  if (threadIdx.x == 0) {
    int places = 1;
#pragma unroll
    for (int r = 0; r < kRank; ++r) places *= problem.slab[r];
    tables.rows = rows;
    tables.places = places;
    tables.slab_bytes = places * kColumnBytes<Plan>;
  }

  // A ballot gathers the bits of one lane, of 128 columns
  constexpr int kBallots = sizeof(Bits<Plan>) / sizeof(unsigned);
  int first = 0;
#pragma unroll
  for (int r = 1; r < kRank; ++r) {
    const Divisor size = problem.list[r];
    int coordinate[4 * kBallots];
#pragma unroll
    for (int i = 0; i < 4 * kBallots; ++i) {
      const int column = i / 4 * 128 + lane / 2 * 8 + i % 4 * 2 + lane % 2;
      int rest = column;
#pragma unroll
      for (int inner = kRank - 1; inner > r; --inner) rest = problem.list[inner].quotient(rest);
      coordinate[i] = column < area ? size.remainder(rest) : size;
    }
#pragma unroll 1
    for (int index = threadIdx.x / 32; index <= size; index += Plan::kWarps)
#pragma unroll
      for (int i = 0; i < 4 * kBallots; ++i) {
        const unsigned bits = __ballot_sync(0xffffffffu, coordinate[i] < index);
        auto* words = reinterpret_cast<unsigned*>(&tables.below[first + index][i % 4]);
        if (lane == 0) words[i / 4] = bits;
      }
    first += size + 1;
  }
}

// The origin of the columns' array.
template <typename Plan, typename Element>
__device__ Origin<Element> origin_of(const HaloProblem<Plan::kRank>& problem,
                                     const View<Element, Plan::kRank>& view,
                                     const HaloTables<Plan>& tables) {
  const auto& rows = tables.rows;
  const int head =
      Plan::kRowsAreKeys ? rows.head * problem.group_size : rows.head / problem.group_size;
  Element* data = view.at(0, head);
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    data += problem.axes[r].token({rows.first[r].group, tables.reach[r].begin}) * view.token[r];
  return {data, unsigned(view.batch / kStep<Element>), unsigned(view.head / kStep<Element>),
          unsigned(problem.axes[0].dilation * view.token[0] / kStep<Element>)};
}

// Fills the origins and steps of columns. Places past the reach of the block repeat its last ones.
template <typename Plan, int kRowDim, typename Vectors, typename Statistics>
__device__ void fill_steps(const HaloProblem<Plan::kRank>& problem, const Vectors& first,
                           const Vectors& second, const Statistics& statistics,
                           HaloMemory<Plan, kRowDim>& smem) {
  constexpr int kRank = Plan::kRank;
  auto& tables = smem.tables;
  if (threadIdx.x == 0) tables.first = origin_of<Plan>(problem, first, tables);
  if (threadIdx.x == 32) tables.second = origin_of<Plan>(problem, second, tables);
  if constexpr (Plan::kRowsAreKeys)
    if (threadIdx.x == 64) tables.statistics = origin_of<Plan>(problem, statistics, tables);
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.places; i += Plan::kWarps * 32) {
    int rest = i, tokens[kRank], phase = 0, pitch = 1;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Divisor size = problem.slab[r];
      const Range reach = tables.reach[r];
      const int coordinate = r == 0 ? rest : size.remainder(rest);
      phase += coordinate * pitch;
      pitch *= problem.list[r];
      tokens[r] = smaller(coordinate, reach.end - 1 - reach.begin) * problem.axes[r].dilation;
      rest = size.quotient(rest);
    }
    smem.steps()[i] = {unsigned(i * kColumnBytes<Plan> + phase % 8 * 16), steps_to(first, tokens),
                       steps_to(second, tokens),
                       Plan::kRowsAreKeys ? steps_to(statistics, tokens) : 0};
  }
}

// One slab of one batch entry. The last of several begins early, so as to end with the reach: its
// first columns were in the slab before.
struct Slab {
  int batch;
  int member;  // the column's head among those that share the row's
  int index;   // among the slabs of the block

  // Whether it is the first of a batch entry
  __device__ bool is_first() const { return index == 0 && member == 0; }
};

// Columns along the first axis from the first one of the block to that of a slab.
template <typename Plan>
__device__ int base_of(const HaloProblem<Plan::kRank>& problem, const HaloTables<Plan>& tables,
                       int slab) {
  const Range reach = tables.reach[0];
  const int size = problem.slab[0];
  return smaller(slab * size, larger(reach.end - reach.begin - size, 0));
}

// Moves on to the next slab; false after the last.
template <typename Plan>
__device__ bool advance(const HaloProblem<Plan::kRank>& problem, const HaloTables<Plan>& tables,
                        Slab& slab) {
  if (!Plan::kWhole && ++slab.index < tables.slabs) return true;
  slab.index = 0;
  if (Plan::kRowsAreKeys) {
    if (++slab.member < problem.group_size) return true;
    slab.member = 0;
  }
  return ++slab.batch < smaller((tables.rows.batch + 1) * problem.part, problem.batch);
}

// The element of an array that the first column of a slab has.
template <typename Plan, typename Element>
__device__ Element* first_of(const HaloProblem<Plan::kRank>& problem, const Origin<Element>& origin,
                             const Slab& slab, const HaloTables<Plan>& tables) {
  unsigned steps = slab.batch * origin.batch;
  if (!Plan::kWhole) steps += base_of(problem, tables, slab.index) * origin.line;
  if (Plan::kRowsAreKeys) steps += slab.member * origin.head;
  return step_by(origin.data, steps);
}

// Copies both vectors of every column of a slab.
template <typename Plan, int kRowDim>
__device__ void load_slab(const HaloProblem<Plan::kRank>& problem, const Slab& slab,
                          HaloMemory<Plan, kRowDim>& smem, int buffer) {
  using Element = typename Plan::Element;
  constexpr int kFirst = Plan::kHeadDim / 8, kSecond = Plan::kValueDim / 8;
  // A lane has a chunk of each vector, or where one line holds both, of one of them
  constexpr bool kTogether = kFirst + kSecond <= 8;
  constexpr int kLanes = kTogether ? 8 : kFirst > kSecond ? kFirst : kSecond;
  constexpr int kStride = Plan::kWarps * 32 / kLanes, kUnroll = 4;
  const int chunk = threadIdx.x % kLanes, begin = threadIdx.x / kLanes;
  const bool of_first = chunk < kFirst;
  const auto& tables = smem.tables;
  const Element* first = first_of(problem, tables.first, slab, tables) + chunk * 8;
  const Element* second = first_of(problem, tables.second, slab, tables) + chunk * 8;
  const Element* either = of_first ? first : second - kFirst * 8;
  const unsigned target = smem.slab_of(buffer);
  const ColumnStep* steps = smem.steps() + begin;
#pragma unroll 1
  for (int left = tables.places - begin; left > 0; left -= kUnroll * kStride) {
    uint4 step[kUnroll];  // all read before the first copy, which a later read would wait for
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (i * kStride < left) step[i] = *reinterpret_cast<const uint4*>(&steps[i * kStride]);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (i * kStride >= left) continue;
      const ColumnStep column = {step[i].x, step[i].y, step[i].z, step[i].w};
      const unsigned place = target + column.place;
      if constexpr (kTogether) {
        const unsigned steps_to_it = of_first ? column.first : column.second;
        copy_16_bytes(chunk_of(place, chunk), step_by(either, steps_to_it));
      } else {
        if (of_first) copy_16_bytes(chunk_of(place, chunk), step_by(first, column.first));
        if (chunk < kSecond)
          copy_16_bytes(chunk_of(place, kFirst + chunk), step_by(second, column.second));
      }
    }
    steps += kUnroll * kStride;
  }
}

// Of the first `count` columns of a list those that a lane has.
template <typename Plan>
__device__ Bits<Plan> first_columns(int count, int lane) {
  constexpr int kBits = 8 * sizeof(Bits<Plan>);
  const int mine = count / 8 * 2 + smaller(larger(count % 8 - lane % 4 * 2, 0), 2);
  return mine == 0 ? 0 : ~Bits<Plan>() >> (kBits - mine);
}

// Fills the lists of every slab.
template <typename Plan, int kRowDim>
__device__ void fill_lists(const HaloProblem<Plan::kRank>& problem, int warp, int lane,
                           HaloMemory<Plan, kRowDim>& smem) {
  const auto& tables = smem.tables;
  const int inner = inner_of(problem);
#pragma unroll 1
  for (int slab = 0; slab < tables.slabs; ++slab) {
    bool meets = true;
    int first = 0, phase = 0, pitch = kColumnBytes<Plan>, list_pitch = 1;
    int starts[Plan::kRank];
    Visible<Plan> visible = {{~Bits<Plan>(), ~Bits<Plan>()}};
    int table = 0;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const int size = problem.slab[r], list = problem.list[r];
      // Along the first axis columns before `new_begin` were in the slab before
      int base = tables.reach[r].begin, new_begin = base, new_end = tables.reach[r].end;
      if (r == 0) {
        new_begin = base + slab * size;
        new_end = new_begin + size;
        base += base_of(problem, tables, slab);
      }
      const Range sight = tables.sight[warp][r];
      const int begin = larger(sight.begin, new_begin);
      meets &= begin < smaller(sight.end, new_end);
      const int start = smaller(begin - base, size - list);
      starts[r] = start;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Range window = tables.window[warp * 16 + half * 8 + lane / 4][r];
        const int origin = base + start;
        const int low = smaller(larger(larger(window.begin, new_begin) - origin, 0), list);
        const int high = smaller(larger(window.end - origin, 0), list);
        visible.row[half] &=
            r == 0
                ? first_columns<Plan>(high * inner, lane) & ~first_columns<Plan>(low * inner, lane)
                : tables.below[table + high][lane % 4] & ~tables.below[table + low][lane % 4];
      }
      if (r > 0) table += list + 1;
    }
    smem.visible(slab, warp, lane) = visible;
#pragma unroll
    for (int r = Plan::kRank - 1; r >= 0; --r) {
      first += starts[r] * pitch;
      phase += starts[r] * list_pitch;
      pitch *= problem.slab[r];
      list_pitch *= problem.list[r];
    }
    first += phase % 8 * 16;
    if (lane == 0) smem.first(slab, warp) = Plan::kWhole || meets ? first : kNothing;
  }
}

// What a lane needs of a warp's list in a slab to read operands of products, sixteen columns at a
// time. `first` is the place of the list's first column.
template <typename Plan>
struct ListAddresses {
  unsigned across_first, along_first;
  const int *across_list, *along_list;

  __device__ ListAddresses(unsigned slab, unsigned first, const HaloTables<Plan>& tables, int lane)
      : across_list(&tables.list[lane / 16 * 8 + lane % 8]), along_list(&tables.list[lane % 16]) {
    const unsigned column = slab + (first & ~127u), phase = (first / 16 + lane) % 8;
    across_first = column + (phase ^ lane / 8 % 2) * 16;
    along_first = column + (phase ^ lane / 16) * 16;
  }
  // Eight columns by sixteen dimensions, twice: what S is made of; and sixteen columns by eight
  // dimensions, twice: what O is made of. From column `n` on; `chunk_of` adds dimensions.
  __device__ unsigned across(int n) const { return across_first + across_list[n]; }
  __device__ unsigned along(int n) const { return along_first + along_list[n]; }
};

// Copies one vector of each of a warp's rows, to `offset` in the rows.
template <int kDim, auto kStep, typename Step, typename Element, int kPitch>
__device__ void load_rows(const Element* source, const Step* step, int lane,
                          Element (*rows_smem)[kPitch], int offset) {
  constexpr int kChunks = kDim / 8, kStride = 32 / kChunks;
  const int chunk = lane % kChunks * 8, first = lane / kChunks;
  unsigned steps[16 / kStride];
#pragma unroll
  for (int i = 0; i < 16 / kStride; ++i) steps[i] = step[first + i * kStride].*kStep;
#pragma unroll
  for (int i = 0; i < 16 / kStride; ++i)
    copy_16_bytes(shared_address(place_of(rows_smem, first + i * kStride, offset + chunk)),
                  step_by(source + chunk, steps[i]));
}

// Sixteen elements from `first` on of a warp's rows, as the left operand of a product.
template <typename Element, int kPitch>
__device__ void take_rows(const Element (*rows_smem)[kPitch], int first, int lane,
                          unsigned (&operand)[4]) {
  ldmatrix_x4(operand, address_of(rows_smem, 0, lane % 16, first, lane / 16 * 8));
}

// Writes a row of sums times `factor`, `half` saying which of the lane's two, if it exists. Lanes
// swap words in pairs so that four of them fill 32 bytes, what memory is written in.
template <int kDim, typename Element>
__device__ void store_row(const float (&sum)[kDim / 8][4], int half, float factor, bool exists,
                          int lane, Element* row) {
  const bool odd = lane % 2;
  row += lane % 2 * 8 + lane / 2 % 2 * 4;
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      word[i] =
          pack(sum[d / 8 + i][2 * half] * factor, sum[d / 8 + i][2 * half + 1] * factor, Element());
    const unsigned received = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
    if (exists)
      __stcs(reinterpret_cast<uint2*>(row + d),
             odd ? make_uint2(received, word[1]) : make_uint2(word[0], received));
  }
}

}  // namespace cuneigh::fused::small
