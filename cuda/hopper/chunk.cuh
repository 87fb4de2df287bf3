// A chunk of queries, at most 64, and the keys that a block of chunk.cu goes over for it.
//
// A tile is all queries of a dilation group in one head for each warpgroup of a block, heads that
// share a key head. Boxes of keys cover the window union of the queries. The blocks of a cluster
// share those of a tile; every block takes one tile, or one share.
//
// struct Plan {
//   static constexpr int kRank;          1
//   static constexpr int kWarpgroups;    of consumers: 2
//   static constexpr int kColumns;       keys of a box
//   static constexpr int kStages;        boxes in shared memory
//   static constexpr int kHeadDim, kValueDim;  dimensions, padded to multiples of 16
//   static constexpr int kValueColumns;  padded to a width that wgmma has
//   static constexpr int kSharedBytes;   of ChunkMemory, as the launcher counts them
//   static constexpr int kCluster;       blocks that share the boxes of a tile
//   static constexpr bool kDilated;      some dilation is not 1
//   static constexpr bool kSigned;       scale is not positive
//   using Element;                       float16 or bfloat16
// };
#pragma once

#include "hopper/shared.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct ChunkMemory {
  static constexpr int kQkLines = lines_of(Plan::kHeadDim);
  static constexpr int kVoLines = lines_of(Plan::kValueDim);
  using Line = typename Plan::Element[kLineElements];

  // [..][lines of a vector][tokens][64]
  Line query[Plan::kWarpgroups][kQkLines][kRows];
  Line key[Plan::kStages][kQkLines][Plan::kColumns];
  Line value[Plan::kStages][kVoLines][Plan::kColumns];
  Barrier query_full;
  Barrier key_full[Plan::kStages], key_empty[Plan::kStages];
  Barrier value_full[Plan::kStages], value_empty[Plan::kStages];
  Barrier turn[Plan::kWarpgroups];  // of a warpgroup to issue products
  Barrier shares_full;              // of `ChunkShares::owned`
};

// What a block does.
struct Walk {
  int batch, head;  // the first query head
  int group;        // of dilation
  int queries;      // of the group
  int begin;        // the first key of the block's boxes, by its index in the group
  int boxes;
};

template <typename Plan>
__device__ Walk walk_of_block(const HopperProblem<1>& problem) {
  const Axis axis = axis_of<Plan>(problem, 0);
  const int tile = blockIdx.x / Plan::kCluster, block = blockIdx.x % Plan::kCluster;
  const unsigned rest = problem.tiles[0].quotient(tile);
  Walk walk;
  walk.batch = problem.head_groups.quotient(rest);
  walk.head = (rest - walk.batch * problem.head_groups.divisor) * Plan::kWarpgroups;
  walk.group = tile - rest * problem.tiles[0].divisor;
  walk.queries = axis.group_length(walk.group);
  // Windows are INCREASING (the contract in cuneigh/_window.py), so that two queries tell all
  Range of_first = {}, of_last = {};
#pragma unroll 1  // code comes from memory
  for (int i = 0; i < 2; ++i) {
    of_first = of_last;
    of_last = axis.window(i == 0 ? 0 : walk.queries - 1, walk.group);
  }
  const int boxes = ceil_div(larger(of_last.end - of_first.begin, 0), Plan::kColumns);
  const int least = boxes / Plan::kCluster, more = boxes % Plan::kCluster;  // blocks with one more
  walk.begin = of_first.begin + (block * least + smaller(block, more)) * Plan::kColumns;
  walk.boxes = least + (block < more);
  return walk;
}

}  // namespace cuneigh::hopper
