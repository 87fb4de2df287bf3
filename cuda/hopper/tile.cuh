// How the Hopper kernel cuts a problem: tiles of queries, and the boxes of keys that a tile visits.
//
// Each consumer warpgroup of a block takes a box of 64 queries. The boxes of a block's
// warpgroups lie side by side, along the axes and over query heads that share a key head, and make
// a tile. The keys that any query of the tile sees are, along each axis, one range; boxes of keys
// cover it from its begin on. After them come the additional keys. All in indices of one dilation
// group.
#pragma once

#include "cuneigh/boxes.cuh"

namespace cuneigh::hopper {

// How the coordinates of a tensor map follow from batch, head and token. TMA knows five axes. Along
// up to two token axes they are (dim, last token axis, first token axis, head, batch). Along three,
// heads are folded into the dimensions (`dim` per head) or into the batch (`batch` and `outer`).
struct Folding {
  int dim;    // steps of the innermost axis from head to head
  int outer;  // steps of the outermost axis from head to head,
  int batch;  // and from batch entry to batch entry
};

// A box is loaded in pieces along its first axis: a load spans at most 256 tokens.
struct Pieces {
  int count;
  int rows;    // of the box in each
  int tokens;  // from one piece to the next
};

// A divisor of numbers below 2^31, and what to multiply by instead (Granlund and Montgomery, 1994).
struct Divisor {
  unsigned divisor, multiplier, shift;

  __device__ unsigned quotient(unsigned n) const {
    return multiplier ? __umulhi(n, multiplier) >> shift : n;
  }
};

constexpr int kRows = 64;  // of a warpgroup
constexpr int kMostWarpgroups = 3;

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/hopper/launch.py.
template <int kRank>
struct HopperProblem {
  Axis axes[kRank];
  // Boxes, along each axis
  int query_box[kRank];  // of a warpgroup, 64 queries
  int tile_box[kRank];   // of all warpgroups together
  int key_box[kRank];
  Divisor tiles[kRank];  // along each axis, in group-major order
  Divisor head_groups;   // of heads that are in one tile
  Divisor group_size;    // query heads that share a key head

  int warpgroup[kMostWarpgroups][1 + kRank];  // head and index where each begins in its tile

  // Blocks take whole tiles, then parts of the others, which have some of the warpgroups
  int tile_count;  // over all heads and batch entries
  int whole_tiles;
  Divisor parts;                // of a divided tile
  int block_tiles;              // whole tiles and parts
  int active[kMostWarpgroups];  // bit w of a part is set if it has warpgroup w

  int heads_per_tile;
  int coordinates;  // of a warpgroup's box of queries: the sum of query_box
  Pieces query_pieces, key_pieces;
  int additional;  // number of additional keys
  int value_dim;
  int longest_last;  // whether later tiles see more: the last ones come first
  Folding query, key, value;
  float scale;  // of logits, times log2(e)
  float sign;   // what logits are multiplied by before that
};
static_assert(sizeof(HopperProblem<1>) == 60 + 160 && sizeof(HopperProblem<2>) == 2 * 60 + 160 &&
                  sizeof(HopperProblem<3>) == 3 * 60 + 160,
              "the record that launch.py packs has these sizes");

// An axis, of which the compiler knows it if no axis is dilated.
template <typename Plan>
__device__ Axis axis_of(const HopperProblem<Plan::kRank>& problem, int r) {
  Axis axis = problem.axes[r];
  if (!Plan::kDilated) axis.dilation = 1;
  return axis;
}

template <int kRank>
struct Tile {
  int batch, head, kv_head;  // the first query head
  int active;                // bit w is set if warpgroup w takes part
  GroupIndex first[kRank];   // query
  Range keys[kRank];         // that any query of the tile sees
  int boxes;                 // of keys to visit, the additional keys' included; or kNoTile
};
constexpr int kNoTile = -1;  // after the last one

// Writes a tile to shared memory: it takes more registers than producers have.
template <typename Plan>
__device__ void find_tile(const HopperProblem<Plan::kRank>& problem, int number,
                          Tile<Plan::kRank>& tile) {
  tile.active = -1;
  if (number >= problem.whole_tiles) {
    const unsigned divided = problem.parts.quotient(number - problem.whole_tiles);
    tile.active = problem.active[number - problem.whole_tiles - divided * problem.parts.divisor];
    number = problem.whole_tiles + divided;
  }
  int boxes = 1;
  unsigned rest = problem.longest_last ? problem.tile_count - 1 - number : number;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const unsigned outer = problem.tiles[r].quotient(rest);
    const int box = rest - outer * problem.tiles[r].divisor;
    rest = outer;
    const GroupIndex first = box_begin(axis.dilation, axis.length, box, problem.tile_box[r]);
    const int end = smaller(first.index + problem.tile_box[r], axis.group_length(first.group));
    tile.first[r] = first;
    const Range keys = {axis.window(first.index, first.group).begin,
                        axis.window(end - 1, first.group).end};
    tile.keys[r] = keys;
    boxes *= ceil_div(keys.end - keys.begin, problem.key_box[r]);
  }
  if (Plan::kAdditional) boxes += ceil_div(problem.additional, Plan::kKeys);
  const int batch = problem.head_groups.quotient(rest);
  const int head = (rest - batch * problem.head_groups.divisor) * problem.heads_per_tile;
  tile.boxes = boxes;
  tile.batch = batch;
  tile.head = head;
  tile.kv_head = problem.group_size.quotient(head);
}

// Calls visit(first) for every box of the window's keys in raster order; `first` counts keys from
// the first of the tile on.
template <int kAxis = 0, int kRank, typename Visit>
__device__ void for_each_box(const HopperProblem<kRank>& problem, const Tile<kRank>& tile,
                             int (&first)[kRank], Visit&& visit) {
  if constexpr (kAxis == kRank) {
    visit(first);
  } else {
    const Range& keys = tile.keys[kAxis];  // read again each time: registers are few
#pragma unroll 1
    for (first[kAxis] = 0; first[kAxis] < keys.end - keys.begin;
         first[kAxis] += problem.key_box[kAxis])
      for_each_box<kAxis + 1>(problem, tile, first, visit);
  }
}

}  // namespace cuneigh::hopper
