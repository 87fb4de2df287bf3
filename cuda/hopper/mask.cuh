// Which pairs of a tile's rows and a box of columns are visible.
//
// A thread of a warpgroup holds a row's logits with a fourth of the columns: bit t of a word stands
// for the column 8 (t / 2) + 2 quad + t % 2, where quad is lane % 4. A pair is visible if it is so
// along every axis, so that the word of a row is the conjunction of one word for its coordinate
// along each axis. Two warps make those words for each box of columns, and say for each
// warpgroup whether it needs them: consumers know nothing of the geometry.
#pragma once

#include "hopper/seen.cuh"

namespace cuneigh::hopper {

// What a warpgroup does with a box of columns.
enum Visibility : int {
  kNone,     // no row sees any column: pass it over
  kPartial,  // the words say who sees what
  kAll,      // every row sees every column
  // Of the columns that a key mask does not hide (hidden.cuh), which are not all:
  kPartialHoles,  // likewise
  kHoles,         // every row sees every one
};

// A coordinate is a position along one axis of a warpgroup's box of rows, which has, for 8 x 8
// rows, 16 of them. Those of all warpgroups are numbered one after another.
template <int kRank>
constexpr int kMostCoordinates = kRank == 1 ? kRows : 36;

struct Coordinate {
  int axis;
  int offset;    // from the first row of the tile
  Range window;  // in columns from the first of the tile on
};

// Rows of a tile that a key mask hides, where they count in sums of columns.
template <typename Plan, bool kAny = Plan::kKeyMask && Plan::kSums>
struct HiddenRows {
  __device__ bool hides(int) const { return false; }
};
template <typename Plan>
struct HiddenRows<Plan, true> {
  unsigned bits[Plan::kWarpgroups * kRows / 32];
  __device__ bool hides(int row) const { return bits[row / 32] >> row % 32 & 1; }
};

// Where a column lies in its box along an axis, as a table if there is less time for it.
template <typename Plan, bool kTable = Plan::kSums>
struct Places {
  __device__ void fill(const HopperProblem<Plan::kRank>&, int) {}
  __device__ int along(const HopperProblem<Plan::kRank>& problem, int axis, int column) const {
    return place_in_box(problem.column_box, axis, column);
  }
};
template <typename Plan>
struct Places<Plan, true> {
  unsigned char place[Plan::kRank][Plan::kColumns];

  __device__ void fill(const HopperProblem<Plan::kRank>& problem, int column) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      if (column < Plan::kColumns) place[r][column] = place_in_box(problem.column_box, r, column);
  }
  __device__ int along(const HopperProblem<Plan::kRank>&, int axis, int column) const {
    return place[axis][column];
  }
};

template <typename Plan>
struct MaskTables {
  static constexpr int kRank = Plan::kRank;
  static constexpr int kCoordinates = Plan::kWarpgroups * kMostCoordinates<kRank>;

  // Of each box of columns; after those of all coordinates, if columns are masked, the columns that
  // are seen
  QuadWords words[Plan::kStages][kCoordinates + kMaskedColumns<Plan>];
  // Of the columns of a box: entry `prefix_base[r] + v` has the bits of those before the coordinate
  // v along axis r.
  QuadWords prefix[128 + 2 * kRank];
  // Of a tile. Each lane of the mask warps reads what it wrote itself. (At a multiple of 16 bytes:
  // elsewhere the assembler reads 4 bytes before an entry as well, in one load of 16.)
  Coordinate coordinate[kCoordinates];
  WindowUnion windows[kRank][64];  // of the warpgroup that the lane looks after
  int prefix_base[kRank];
  unsigned char number[kRank][kRows];  // of the coordinates of a row
  HiddenRows<Plan> hidden[2];          // of the tiles in `SharedMemory::tile`
  Places<Plan> place;

  __device__ QuadWords& seen(unsigned stage) { return words[stage][kCoordinates]; }

  // The numbers of the coordinates of a row of warpgroup `w`, a byte for each axis.
  __device__ unsigned numbers(const HopperProblem<kRank>& problem, int w, int row) const {
    unsigned numbers = 0;
#pragma unroll
    for (int r = 0; r < kRank; ++r) numbers |= (w * problem.coordinates + number[r][row]) << 8 * r;
    return numbers;
  }

  // The columns of a box that a row with these `numbers` sees along each axis, of those that lanes
  // `quad` hold.
  __device__ void read(unsigned stage, unsigned numbers, int quad, unsigned (&word)[kRank]) const {
#pragma unroll
    for (int r = 0; r < kRank; ++r) word[r] = words[stage][numbers >> 8 * r & 0xff].word[quad];
  }
};

// Which axis and row a coordinate stands for.
template <int kRank>
__device__ Coordinate coordinate_of(const HopperProblem<kRank>& problem, int number) {
  const int w = number / problem.coordinates;
  number -= w * problem.coordinates;
  Coordinate coordinate = {};
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    if (number >= 0 && number < problem.row_box[r])
      coordinate = {r, problem.warpgroup[w][1 + r] + number, {}};
    number -= problem.row_box[r];
  }
  return coordinate;
}

// Fills the tables. Every thread of the block must call it.
template <typename Plan>
__device__ void fill_mask_tables(const HopperProblem<Plan::kRank>& problem,
                                 MaskTables<Plan>& tables) {
  constexpr int kRank = Plan::kRank, kWarpgroups = Plan::kWarpgroups, columns = Plan::kColumns;
  int base = 0, inner = columns;  // columns between neighbors along the axis
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int length = problem.column_box[r], entries = length + 1;
    inner /= length;
    for (int i = threadIdx.x; i < 4 * entries; i += blockDim.x) {
      const int quad = i % 4, before = i / 4;
      unsigned word = 0;
      for (int t = 0; t < columns / 4; ++t) {
        const int column = 8 * (t / 2) + 2 * quad + t % 2;
        if (column / inner % length < before) word |= 1u << t;
      }
      tables.prefix[base + before].word[quad] = word;
    }
    if (threadIdx.x == 0) tables.prefix_base[r] = base;
    base += entries;
  }
  for (int i = threadIdx.x; i < kWarpgroups * problem.coordinates; i += blockDim.x)
    tables.coordinate[i] = coordinate_of(problem, i);
  tables.place.fill(problem, threadIdx.x);
  if (threadIdx.x < kRows) {
    int rest = threadIdx.x, number = problem.coordinates;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      number -= problem.row_box[r];
      tables.number[r][threadIdx.x] = number + rest % problem.row_box[r];
      rest /= problem.row_box[r];
    }
  }
}

// The lane in the team of warps that make masks, asked for anew each time: their registers are few.
__device__ inline int lane_of_team() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread - 64;
}

// Writes to the tables which columns each coordinate of a tile's rows sees, and which a warpgroup
// as a whole: lane w of each warp looks after warpgroup w, and the other lanes repeat it. `kLanes`
// lanes share the work. Rows past the end of an axis see nothing, and where rows count in sums of
// columns, words must say so.
template <typename Plan, int kLanes>
__device__ void look_up(const HopperProblem<Plan::kRank>& problem, const Tile<Plan::kRank>& tile,
                        MaskTables<Plan>& tables) {
#pragma unroll 1
  for (int i = lane_of_team(); i < Plan::kWarpgroups * problem.coordinates; i += kLanes) {
    Coordinate& coordinate = tables.coordinate[i];
    const int r = coordinate.axis, base = tile.columns[r].begin;
    const Axis axis = axis_of<Plan>(problem, r);
    const int group = tile.first[r].group, index = tile.first[r].index + coordinate.offset;
    Range window = {base, base};
    if (index < rows_of_group<Plan>(axis, group)) window = window_of<Plan>(axis, index, group);
    coordinate.window = {window.begin - base, window.end - base};
  }
#pragma unroll 1
  for (int r = 0; r < Plan::kRank; ++r) {
    asm volatile("" : "+r"(r));  // registers are few: no address is kept from axis to axis
    const int w = smaller(lane_of_team() % 32, Plan::kWarpgroups - 1);
    const Axis axis = axis_of<Plan>(problem, r);
    const int group = tile.first[r].group, base = tile.columns[r].begin;
    const int first = tile.first[r].index + problem.warpgroup[w][1 + r];
    const int end = rows_of_group<Plan>(axis, group);
    // Rows of parts may see no column but additional keys, so that an empty union is not enough
    WindowUnion windows = {{0, Axis::kIsPart ? -1 : 0}, {0, 0}};
    if (first < end && tile.active >> w & 1) {  // else it has no rows
      const Range low = window_of<Plan>(axis, first, group);
      const Range high = window_of<Plan>(axis, smaller(first + problem.row_box[r], end) - 1, group);
      windows = {{low.begin - base, high.end - base}, {high.begin - base, low.end - base}};
      if (Plan::kSums && first + problem.row_box[r] > end) windows.all = {0, 0};
    }
    tables.windows[r][lane_of_team()] = windows;
  }
}

// What the warpgroup that the lane looks after does with the box of columns that begins at `first`.
template <typename Plan>
__device__ Visibility visibility_of(const HopperProblem<Plan::kRank>& problem,
                                    const MaskTables<Plan>& tables, int lane,
                                    const int (&first)[Plan::kRank]) {
  constexpr int kRank = Plan::kRank;
  bool none = false, all = true;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int end = first[r] + problem.column_box[r];
    const WindowUnion windows = tables.windows[r][lane];
    none |= windows.misses(first[r], end);
    all &= windows.covers(first[r], end);
  }
  return none ? kNone : all ? kAll : kPartial;
}

// Makes the words of the lane's coordinates for the box of columns that begins at `first`.
template <int kLanes, typename Plan>
__device__ void mark_visible(const HopperProblem<Plan::kRank>& problem, const Tile<Plan::kRank>&,
                             MaskTables<Plan>& tables, unsigned stage, int lane,
                             const int (&first)[Plan::kRank]) {
  constexpr int kRank = Plan::kRank;
  QuadWords* words = tables.words[stage];
#pragma unroll 1
  for (int i = lane; i < Plan::kWarpgroups * problem.coordinates; i += kLanes) {
    const int r = tables.coordinate[i].axis;
    int begin = first[0];
#pragma unroll
    for (int other = 1; other < kRank; ++other)
      if (r == other) begin = first[other];
    const auto entry = [&](int column) {
      return tables.prefix_base[r] + smaller(larger(column - begin, 0), problem.column_box[r]);
    };
    const int before = entry(tables.coordinate[i].window.begin);
    const int until = entry(tables.coordinate[i].window.end);
#pragma unroll 1  // registers are few
    for (int quad = 0; quad < 4; ++quad)
      words[i].word[quad] = tables.prefix[until].word[quad] & ~tables.prefix[before].word[quad];
  }
}

// The word of the columns of a box before the column `end`, in the order of the box.
__device__ inline unsigned first_columns(int end, int quad) {
  const int left = larger(end - 2 * quad, 0);
  const int bits = left / 8 * 2 + smaller(left % 8, 2);
  return bits >= 32 ? ~0u : (1u << bits) - 1;
}

// Hides the logits of one of a thread's two rows whose bit in `word` is 0; S is [kRows, 8 kTiles].
template <int kTiles>
__device__ void hide(float (&logit)[kTiles][4], int half, unsigned word) {
#pragma unroll
  for (int t = 0; t < 2 * kTiles; ++t) {
    float& x = logit[t / 2][2 * half + t % 2];
    x = word & 1u << t ? x : -infinity<float>();
  }
}

}  // namespace cuneigh::hopper
