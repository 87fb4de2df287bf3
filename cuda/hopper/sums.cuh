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
  float* sum;      // [boxes of queries][floats of a box], in the order of the accumulators
  unsigned* made;  // [boxes of queries] contributions so far; 0 before the launch
};

// A contribution of a tile to the sum of a box of queries.
struct Turn {
  unsigned box;     // the number of the sum, which dq_of_sums.cu takes apart
  unsigned number;  // of the contribution; 0 is the first
};

// The turn of `tile` at the box of queries of `head` that begins at `begin`. Tiles that meet the
// box are those with a key in the windows of its queries: one range of them.
template <typename Plan>
__device__ Turn turn_of(const HopperProblem<1>& problem, const Tile<1>& tile, unsigned head,
                        int begin) {
  constexpr int kTile = Plan::kWarpgroups * kRows;
  const Axis axis = axis_of<Plan>(problem, 0);
  const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
  const int earliest = axis.window(begin, 0).begin / kTile;
  return {(tile.batch * heads + head) * problem.head_sums + begin / Plan::kColumns,
          static_cast<unsigned>(tile.first[0].index / kTile - earliest)};
}

// One lane of a producer warp: brings this block's contributions from shared memory to the sums.
// While one is on its way, the lane works out the turn of the next.
template <typename Plan>
__device__ void add_sums(const Sums& sums, SharedMemory<Plan>& smem) {
  constexpr unsigned kFloats = sizeof(smem.sum) / sizeof(float);
  unsigned* last = nullptr;  // counts the contribution that is on its way
  const auto finish_last = [&] {
    if (!last) return;
    wait_until_read();
    smem.sum_empty.arrive();
    wait_until_written();
    fence_global();
    add_release(last, 1);
    last = nullptr;
  };
  Ring<1> ring;
  for_each_tile<false>(smem, [&](const Tile<1>& tile) {
    for_each_box<Plan>(smem.problem, tile, [&](int head, const int (&first)[1]) {
      const Turn turn = turn_of<Plan>(smem.problem, tile, head, tile.columns[0].begin + first[0]);
      float* sum = sums.sum + static_cast<unsigned long long>(turn.box) * kFloats;
      unsigned* made = sums.made + turn.box;
      finish_last();  // before anything is awaited that may depend on it
      while (load_acquire(made) != turn.number) {
      }
      fence_global();  // what others have added comes before what is added now
      smem.sum_full.wait(ring.parity());
      if (turn.number == 0)
        store_bulk(sum, shared_address(smem.sum), sizeof(smem.sum));
      else
        add_bulk(sum, shared_address(smem.sum), sizeof(smem.sum));
      commit_bulk();
      last = made;
      ring.advance();
    });
    finish_last();  // before this block waits for its next tile, or ends
  });
}

}  // namespace cuneigh::hopper
