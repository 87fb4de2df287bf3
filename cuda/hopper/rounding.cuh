// dQ from its sums (sums.cuh): rounds them, times the scale. That is done by blocks that begin when
// others leave a multiprocessor, while the last tiles are still worked on: the last `rounders` to
// begin, and others that find no tile. They wait for tiles, which is no deadlock: all blocks that
// have taken tiles have begun, and wait for nobody.
#pragma once

#include "hopper/results.cuh"
#include "hopper/sums.cuh"

namespace cuneigh::hopper {

// Takes this block's first tile, and writes its number to shared memory; false if the block is to
// round sums. Every thread must call it.
template <typename Plan>
__device__ bool find_work(const HopperProblem<Plan::kRank>& problem, const Sums& sums,
                          unsigned* taken, SharedMemory<Plan>& smem) {
  if (threadIdx.x == 0) {
    const bool works = atomicAdd(sums.begun, 1u) < gridDim.x - sums.rounders;
    smem.first_number = works ? atomicAdd(taken, 1u) : problem.block_tiles;
  }
  __syncthreads();
  return smem.first_number < problem.block_tiles;
}

// Rounds the sums of a granule, by a warp.
template <typename Plan>
__device__ void round_granule(const HopperProblem<Plan::kRank>& problem, const Sums& sums,
                              const View<float, Plan::kRank>& units,
                              const View<typename Plan::Element, Plan::kRank>& grad_query,
                              unsigned granule, int batch, int head) {
  constexpr int kRank = Plan::kRank, kTiles = kLineElements / 8;
  constexpr int kLines = SumMemory<Plan>::kSumLines;
  const int lane = threadIdx.x % 32, granules = granules_of(problem);
  int token[kRank];
  token[kRank - 1] = int(granule % granules) * kGranule - problem.granule_lead + lane / 4;
  const bool exists = token[kRank - 1] >= 0 && token[kRank - 1] < problem.axes[kRank - 1].length;
  unsigned rest = granule / granules;
#pragma unroll
  for (int r = kRank - 2; r >= 0; --r) {
    token[r] = rest % problem.axes[r].length;
    rest /= problem.axes[r].length;
  }
  int4 sum[kLines][kGranuleParts];
#pragma unroll
  for (int line = 0; line < kLines; ++line)
#pragma unroll
    for (int part = 0; part < kGranuleParts; ++part)
      sum[line][part] =
          sums.sum[(line * sums.granules + granule) * kGranuleInt4s + part * 32 + lane];
  const float unit = exists ? 1 / *units.at(batch, token, head) : 0;
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    float result[kTiles][4] = {};  // the first of a lane's two rows
#pragma unroll
    for (int part = 0; part < kGranuleParts; ++part) {
      const int4 four = sum[line][part];
      result[2 * part][0] = four.x * unit, result[2 * part][1] = four.y * unit;
      result[2 * part + 1][0] = four.z * unit, result[2 * part + 1][1] = four.w * unit;
    }
    const int first = line * kLineElements;
    store_row(result, 0, problem.gradient_scale, lane % 4,
              grad_query.at(batch, token, head) + first, problem.head_dim - first, exists);
  }
}

// Rounds sums by all warps of a block, some granules at a time, until none is left: those of head
// after head, as tiles are.
template <typename Plan>
__device__ void round_sums(const HopperProblem<Plan::kRank>& problem, const Sums& sums,
                           const View<float, Plan::kRank>& units,
                           const View<typename Plan::Element, Plan::kRank>& grad_query,
                           SharedMemory<Plan>& smem) {
  constexpr unsigned kWarps = 4 * (Plan::kWarpgroups + 1), kAtATime = 8 * kWarps;
  const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
  unsigned of_head = granules_of(problem), tiles = 1;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    tiles *= problem.tiles[r].divisor;
    if (r < Plan::kRank - 1) of_head *= problem.axes[r].length;
  }
  unsigned complete = 0;  // key heads of all batch entries whose tiles are finished
  for (;;) {
    __syncthreads();  // all have read the last number
    if (threadIdx.x == 0) smem.first_number = atomicAdd(sums.rounded, kAtATime);
    __syncthreads();
    if (smem.first_number >= sums.granules) return;
#pragma unroll 1
    for (unsigned i = threadIdx.x / 32; i < kAtATime; i += kWarps) {
      const unsigned granule = smem.first_number + i;
      if (granule >= sums.granules) break;
      const unsigned batch_head = granule / of_head;
      for (; complete <= batch_head / problem.group_size.divisor; ++complete)
        if (threadIdx.x % 32 == 0)
          while (load_acquire(sums.finished + complete) != tiles) {
          }
      __syncwarp();
      round_granule<Plan>(problem, sums, units, grad_query, granule, batch_head / heads,
                          batch_head % heads);
    }
  }
}

}  // namespace cuneigh::hopper
