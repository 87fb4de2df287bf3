// Sums that tiles of keys add to: dQ, a float32 array in global memory. There is one token axis,
// without dilation.
//
// Every tile of keys adds to the sum of every box of queries that its window union meets. Boxes
// are those of a grid from the first query on (Plan::kSums), so that tiles have them in common. A
// sum must not depend on which block is faster: contributions come in the order of the tiles'
// numbers, and each waits for its turn. Blocks take tiles in that order, too, so that a tile only
// waits for tiles that were begun before it. They walk over the boxes from the last one to the
// first: tiles side by side then meet a box one after another, and hardly wait.
#pragma once

#include "hopper/shared.cuh"

namespace cuneigh::hopper {

struct Sums {
  float* sum;          // [boxes of queries][floats of a box], in the order of the accumulators
  unsigned* made;      // [boxes of queries] contributions so far; 0 before the launch
  unsigned* begun;     // blocks that have begun; 0 before the launch
  unsigned* rounded;   // boxes that blocks have taken to round; 0 before the launch
  long long count;     // boxes of queries of all heads
  long long rounders;  // blocks that round sums; of the others, those that find no tile do, too
};

// A contribution of a tile to the sum of a box of queries.
struct Turn {
  unsigned box;     // the number of the sum
  unsigned number;  // of the contribution; 0 is the first
};

// Tiles that meet the box of queries that begins at `begin`: those with a key in the windows of its
// queries, which are one range.
template <typename Plan>
__device__ Range tiles_of(const HopperProblem<1>& problem, int begin) {
  constexpr int kTile = Plan::kWarpgroups * kRows;
  const Axis axis = axis_of<Plan>(problem, 0);
  const int last = smaller(begin + Plan::kColumns, axis.length) - 1;
  return {axis.window(begin, 0).begin / kTile, ceil_div(axis.window(last, 0).end, kTile)};
}

// The turn of `tile` at the box of queries of `head` that begins at `begin`.
template <typename Plan>
__device__ Turn turn_of(const HopperProblem<1>& problem, const Tile<1>& tile, unsigned head,
                        int begin) {
  constexpr int kTile = Plan::kWarpgroups * kRows;
  const int earliest = tiles_of<Plan>(problem, begin).begin;
  const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
  return {(tile.batch * heads + head) * problem.head_sums + begin / Plan::kColumns,
          static_cast<unsigned>(tile.first[0].index / kTile - earliest)};
}

// One lane of a producer warp: brings this block's contributions from shared memory to the sums,
// those that come to the place `mine`. Another lane brings the others meanwhile: a contribution is
// on its way for as long as its box takes. While it is, the lane works out the turn of the next.
template <typename Plan>
__device__ void add_sums(const Sums& sums, SharedMemory<Plan>& smem, unsigned mine) {
  constexpr unsigned kBytes = sizeof(smem.sum[0]);
  unsigned* last = nullptr;  // counts the contribution that is on its way
  Ring<2> ring;
  const auto finish_last = [&] {
    if (!last) return;
    wait_until_read();
    smem.sum_empty[mine].arrive();
    wait_until_written();
    fence_global();
    add_release(last, 1);
    last = nullptr;
  };
  for_each_tile<false>(smem, [&](const Tile<1>& tile) {
    for_each_box<Plan>(smem.problem, tile, [&](int head, const int (&first)[1]) {
      const Ring<2> place = ring;
      ring.advance();
      if (place.slot() != mine) return;
      const Turn turn = turn_of<Plan>(smem.problem, tile, head, tile.columns[0].begin + first[0]);
      float* sum = sums.sum + static_cast<unsigned long long>(turn.box) * (kBytes / sizeof(float));
      unsigned* made = sums.made + turn.box;
      finish_last();  // before anything is awaited that may depend on it
      while (load_acquire(made) != turn.number) {
      }
      fence_global();  // what others have added comes before what is added now
      smem.sum_full[mine].wait(place.parity());
      const unsigned contribution = shared_address(smem.sum[mine]);
      if (turn.number == 0)
        store_bulk(sum, contribution, kBytes);
      else
        add_bulk(sum, contribution, kBytes);
      commit_bulk();
      last = made;
    });
    finish_last();  // before this block waits for its next tile, or ends
  });
}

}  // namespace cuneigh::hopper
