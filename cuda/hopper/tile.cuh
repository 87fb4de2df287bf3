// How the Hopper kernels cut a problem: tiles of rows, and the boxes of columns that a tile visits.
//
// In the forward pass and for dQ rows are queries and columns are keys; the window of a row is the
// window of the query. For dK and dV rows are keys and columns are queries; the window of a row is
// the inverse window of the key (Plan::kRowsAreKeys).
//
// Each consumer warpgroup of a block takes a box of 64 rows. The boxes of a block's warpgroups lie
// side by side, along the axes or over query heads that share a key head, and make a tile. The
// window union of a tile, of the columns in the window of any of its rows, is one range along each
// axis; boxes of columns cover it from its begin on or, along the last axis if Plan::kSums, from
// that of the granule it begins in (sums.cuh). After them come the additional keys. All in indices
// of one dilation group.
#pragma once

#include "cuneigh/boxes.cuh"

namespace cuneigh::hopper {

// How the coordinates of a tensor map follow from batch, head and token. TMA knows five axes. Along
// up to two token axes they are (dim, last token axis, first token axis, head, batch). Along three,
// heads are folded into the dimensions (`dim` per head) or into the batch (`batch` and `outer`).
struct Folding {
  int dim;    // steps of the innermost axis from head to head
  int outer;  // steps of the outermost axis from head to head
  int batch;  // steps of the outermost axis from batch entry to batch entry
};

// A box is loaded in pieces along its first axis: a load spans at most 256 tokens.
struct Pieces {
  int count;   // of the pieces
  int rows;    // rows (or columns) of the box in each piece
  int tokens;  // tokens from the begin of one piece to that of the next
};

// A divisor of numbers below 2^31, and what to multiply by instead (Granlund and Montgomery, 1994).
// `divisor` of cuneigh/_backends/hopper/launch.py makes it; a divisor of 1 has the multiplier 0.
struct Divisor {
  unsigned divisor, multiplier, shift;

  __device__ unsigned quotient(unsigned n) const {
    return multiplier ? __umulhi(n, multiplier) >> shift : n;
  }
};

constexpr int kRows = 64;    // of a warpgroup
constexpr int kGranule = 8;  // columns side by side along the last axis, whose sums lie together
constexpr int kMostWarpgroups = 3;

// What a kernel is told beside its arrays. `_record` of cuneigh/_backends/hopper/launch.py packs
// it.
template <int kRank>
struct HopperProblem {
  Axis axes[kRank];
  // Boxes, along each axis
  int row_box[kRank];   // of a warpgroup, 64 rows
  int tile_box[kRank];  // of all warpgroups together
  int column_box[kRank];
  Divisor tiles[kRank];  // along each axis, in group-major order
  Divisor head_groups;   // row heads, divided by those of a tile
  Divisor group_size;    // query heads that share a key head

  int warpgroup[kMostWarpgroups][1 + kRank];  // head and index where each begins in its tile

  // Blocks take whole tiles first. Each tile that is left is divided into parts, and a block that
  // takes a part works with some of its warpgroups.
  int tile_count;  // over all heads and batch entries
  int whole_tiles;
  Divisor parts;                // of a divided tile
  int block_tiles;              // whole tiles and parts
  int active[kMostWarpgroups];  // bit w of a part is set if it has warpgroup w

  int heads_per_tile;
  int coordinates;  // of a warpgroup's box of rows: the sum of row_box
  Pieces row_pieces, column_pieces;
  int additional;  // number of additional keys
  int head_dim;
  int value_dim;
  int longest_last;      // whether later tiles see more: the last ones come first
  int granule_lead;      // columns that the first granule begins before the first (sums.cuh)
  int first_axis_first;  // if kSums: whether tiles follow each other along the first axis
  // Of query or key (qk) and of value or dO (vo)
  Folding row_qk, row_vo, column_qk, column_vo;
  float scale;           // of logits, times log2(e)
  float sign;            // what logits are multiplied by before that
  float gradient_scale;  // of dQ and dK
};
static_assert(sizeof(HopperProblem<1>) == 36 + sizeof(Axis) + 188 &&
                  sizeof(HopperProblem<2>) == 2 * (36 + sizeof(Axis)) + 188 &&
                  sizeof(HopperProblem<3>) == 3 * (36 + sizeof(Axis)) + 188,
              "the record that launch.py packs has these sizes");

// Where a token of a box lies along one of its axes.
template <int kRank>
__device__ int place_in_box(const int (&box)[kRank], int axis, int token) {
#pragma unroll
  for (int r = kRank - 1; r > 0; --r)
    if (r > axis) token /= box[r];
  return token % box[axis];
}

// An axis of the problem. Where no axis is dilated the compiler is told that its dilation is 1.
template <typename Plan>
__device__ Axis axis_of(const HopperProblem<Plan::kRank>& problem, int r) {
  Axis axis = problem.axes[r];
  if (!Plan::kDilated) axis.dilation = 1;
  return axis;
}

// What a row of an axis sees, and how many rows a dilation group has.
template <typename Plan>
__device__ Range window_of(const Axis& axis, int index, int group) {
  return Plan::kRowsAreKeys ? axis.inverse(index, group) : axis.window(index, group);
}
template <typename Plan>
__device__ int rows_of_group(const Axis& axis, int group) {
  return Plan::kRowsAreKeys ? axis.key_group_length(group) : axis.group_length(group);
}

template <int kRank>
struct Tile {
  int batch, head;          // the first row head
  int column_head;          // the first, of several if rows are keys
  int active;               // bit w is set if warpgroup w takes part
  GroupIndex first[kRank];  // the first row along each axis
  Range columns[kRank];     // the window union
  unsigned position;        // of the tile in the ring of tiles (for_each_tile)
  int next;                 // the number of the tile that the block takes after it, unless kSums
  int boxes;                // of columns to visit, the additional keys' included; or kNoTile
};
constexpr int kNoTile = -1;  // after the last one

// The dilation group, along an axis, of the columns that rows of a tile may see.
template <typename Plan>
__device__ int column_group(const HopperProblem<Plan::kRank>& problem,
                            const Tile<Plan::kRank>& tile, int r) {
  const int group = tile.first[r].group;
  if constexpr (!Axis::kIsPart) return group;
  const Axis axis = axis_of<Plan>(problem, r);
  return Plan::kRowsAreKeys ? axis.query_group(group) : axis.key_group(group);
}

// Writes a tile to shared memory: it takes more registers than producers have. Returns the tile's
// number among those of its batch entry that have the same heads.
template <typename Plan>
__device__ int find_tile(const HopperProblem<Plan::kRank>& problem, int number,
                         Tile<Plan::kRank>& tile) {
  tile.active = -1;
  if (number >= problem.whole_tiles) {
    const unsigned divided = problem.parts.quotient(number - problem.whole_tiles);
    tile.active = problem.active[number - problem.whole_tiles - divided * problem.parts.divisor];
    number = problem.whole_tiles + divided;
  }
  int boxes = 1, number_in_head = 0, tiles = 1;
  const unsigned place = problem.longest_last ? problem.tile_count - 1 - number : number;
  unsigned rest = place;
#pragma unroll
  for (int i = Plan::kRank - 1; i >= 0; --i) {
    const int r = Plan::kSums && problem.first_axis_first ? Plan::kRank - 1 - i : i;
    const Axis axis = axis_of<Plan>(problem, r);
    const unsigned outer = problem.tiles[r].quotient(rest);
    const int box = rest - outer * problem.tiles[r].divisor;
    rest = outer;
    number_in_head += box * tiles;
    tiles *= problem.tiles[r].divisor;
    const int length = Plan::kRowsAreKeys ? axis.key_length : axis.length;
    const GroupIndex first = box_begin(axis.dilation, length, box, problem.tile_box[r]);
    const int end =
        smaller(first.index + problem.tile_box[r], rows_of_group<Plan>(axis, first.group));
    static_assert(!Axis::kIsPart || !Plan::kSums, "all tiles count the same columns");
    tile.first[r] = first;
    Range columns = {window_of<Plan>(axis, first.index, first.group).begin,
                     window_of<Plan>(axis, end - 1, first.group).end};
    if (Plan::kSums && r == Plan::kRank - 1)
      columns.begin -= (columns.begin + problem.granule_lead) % kGranule;
    tile.columns[r] = columns;
    boxes *= ceil_div(columns.end - columns.begin, problem.column_box[r]);
  }
  if (Plan::kRowsAreKeys) boxes *= problem.group_size.divisor;
  if (Plan::kAdditional) boxes += ceil_div(problem.additional, Plan::kColumns);
  const int batch = problem.head_groups.quotient(rest);
  const int head = (rest - batch * problem.head_groups.divisor) * problem.heads_per_tile;
  tile.boxes = boxes;
  tile.batch = batch;
  tile.head = head;
  tile.column_head =
      Plan::kRowsAreKeys ? head * problem.group_size.divisor : problem.group_size.quotient(head);
  return batch * tiles + number_in_head;
}

// Calls visit() with every value of `first` that the boxes of one column head have, in raster
// order; the axes before kAxis are set.
template <int kAxis = 0, int kRank, typename Visit>
__device__ void for_each_first(const HopperProblem<kRank>& problem, const Tile<kRank>& tile,
                               int (&first)[kRank], Visit&& visit) {
  if constexpr (kAxis == kRank) {
    visit();
  } else {
    const Range& columns = tile.columns[kAxis];  // read again each time: registers are few
#pragma unroll 1
    for (first[kAxis] = 0; first[kAxis] < columns.end - columns.begin;
         first[kAxis] += problem.column_box[kAxis])
      for_each_first<kAxis + 1>(problem, tile, first, visit);
  }
}

// Calls visit(head, first) for every box of the columns of a tile: for each column head, in the
// order of `for_each_first`. `first` counts columns from the first of the tile on.
template <typename Plan, typename Visit>
__device__ void for_each_box(const HopperProblem<Plan::kRank>& problem,
                             const Tile<Plan::kRank>& tile, Visit&& visit) {
  int first[Plan::kRank];
  if constexpr (Plan::kRowsAreKeys) {
#pragma unroll 1
    for (int h = 0; h < problem.group_size.divisor; ++h)
      for_each_first(problem, tile, first, [&] { visit(tile.column_head + h, first); });
  } else {
    for_each_first(problem, tile, first, [&] { visit(tile.column_head, first); });
  }
}

}  // namespace cuneigh::hopper
