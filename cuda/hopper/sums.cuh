// Sums that tiles of keys add to: dQ, in fixed point, in global memory.
//
// Every tile of keys adds to dQ of every query that its window union holds. A result must not
// depend on which block is faster, and sums of integers do not depend on their order. So dQ of a
// query is counted in units, a power of two that follows from the largest sum that there can be
// (sums/units.cuh), and blocks add whenever they like.
//
// Eight queries side by side along the last axis are a granule, whose sums lie together, in the
// order in which the lanes of a warp have them of a product: a contribution is copied as it is.
// Granules begin `granule_lead` columns before the first; boxes of columns begin with one.
#pragma once

#include "cuneigh/layout.cuh"
#include "hopper/shared.cuh"

namespace cuneigh::hopper {

struct Sums {
  // [lines of dQ][batch, query heads][x1..x(r-1)][granules along xr][kGranuleParts][lanes][4]
  int4* sum;           // 0 before the launch (prepare.cu), as all that follow
  unsigned* finished;  // [batch, key heads] tiles whose contributions are in memory
  unsigned* begun;     // blocks that have begun
  unsigned* rounded;   // granules that blocks have taken to round (rounding.cuh)
  long long granules;  // of all heads and batch entries
  long long rounders;  // blocks that round sums
};
constexpr int kGranuleInt4s = kGranuleParts * 32;

// Granules along the last axis.
template <int kRank>
__device__ int granules_of(const HopperProblem<kRank>& problem) {
  return ceil_div(problem.axes[kRank - 1].length + problem.granule_lead, kGranule);
}

// Makes the units of the queries of a box NaN, so that dQ will be NaN. By a warp.
template <typename Plan>
__device__ void lose(const View<float, Plan::kRank>& units, const SharedMemory<Plan>& smem,
                     const Tile<Plan::kRank>& tile, int head, const int (&first)[Plan::kRank]) {
#pragma unroll 1
  for (int column = threadIdx.x % 32; column < Plan::kColumns; column += 32) {
    int token[Plan::kRank];
    bool exists = true;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      token[r] = tile.columns[r].begin + first[r] + smem.mask.place.along(smem.problem, r, column);
      exists &= 0 <= token[r] && token[r] < smem.problem.axes[r].length;
    }
    if (exists) *units.at(tile.batch, token, head) = __int_as_float(0x7fffffff);
  }
}

// One warp: adds this block's contributions to the sums. A lane takes granules of a contribution
// that are neighbors along the last axis.
template <typename Plan>
__device__ void add_sums(const Sums& sums, const View<float, Plan::kRank>& units,
                         SharedMemory<Plan>& smem) {
  constexpr int kRank = Plan::kRank, kLast = kRank - 1;
  const auto& problem = smem.problem;
  Ring<1> ring;
  Ring<kUnitSlots> box;
  for_each_tile<true>(smem, [&](const Tile<kRank>& tile) {
    for_each_box<Plan>(problem, tile, [&](int head, const int (&first)[kRank]) {
      constexpr int kOfSum = kRows / kGranule;  // granules of a contribution
      const int lane = threadIdx.x % 32;
      const int run = smaller(problem.column_box[kLast] / kGranule, kOfSum);
      const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
      unsigned long long at = tile.batch * heads + head;
      const int column = lane * run * kGranule;
      const auto index = [&](int r) {
        const int inside = smem.mask.place.along(problem, r, column % Plan::kColumns);
        return tile.columns[r].begin + first[r] + inside;
      };
      bool exists = column < Plan::kColumns;
#pragma unroll
      for (int r = 0; r < kLast; ++r) {
        exists &= index(r) < problem.axes[r].length;
        at = at * problem.axes[r].length + index(r);
      }
      const int granules = granules_of(problem);
      const int begin = (index(kLast) + problem.granule_lead) / kGranule;
      const int count = smaller(run, granules - begin);
      int4* sum = sums.sum + (at * granules + begin) * kGranuleInt4s;
      exists &= count > 0;
#pragma unroll
      for (int w = 0; w < Plan::kWarpgroups; ++w) {
        smem.sum_full[w].wait(ring.parity());
        fence_shared();  // here, since consumers have no time for it
        const int granule = lane * run - smem.first_query(w) / kGranule;  // of the contribution
        if (exists && 0 <= granule && granule < kOfSum)
          add_bulk(sum + smem.sum_line(w) * sums.granules * kGranuleInt4s,
                   shared_address(smem.sum[w][granule]), count * sizeof(smem.sum[w][0]));
        commit_bulk();
      }
      if constexpr (kMayOverflow<Plan>) {
        bool& overflows = smem.overflows[box.slot()];
        if (overflows) lose(units, smem, tile, head, first);
        __syncwarp();
        if (lane == 0) overflows = false;
        box.advance();
      }
      wait_until_read<1>();
      smem.sum_empty[0].arrive_as_warp();
      wait_until_read<0>();
      smem.sum_empty[1].arrive_as_warp();
      ring.advance();
    });
    wait_until_written();
    fence_global();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
      add_release(sums.finished + tile.batch * problem.head_groups.divisor + tile.head, 1);
  });
}

}  // namespace cuneigh::hopper
