// dQ from its sums (sums.cuh): rounds them, times the scale. Blocks that find no tile do that, and
// the last ones to begin, whose number is `rounders`: they come when others leave a multiprocessor
// while the last tiles are still worked on. They may wait for any tile. That is no deadlock: either
// all blocks that take tiles have begun, or all tiles are taken.
#pragma once

#include "hopper/results.cuh"
#include "hopper/sums.cuh"

namespace cuneigh::hopper {

// Takes this block's first tile, and writes its number to shared memory; false if the block is to
// round sums. Every thread must call it.
template <typename Plan>
__device__ bool find_work(const HopperProblem<1>& problem, const Sums& sums, unsigned* taken,
                          SharedMemory<Plan>& smem) {
  if (threadIdx.x == 0) {
    const bool works = atomicAdd(sums.begun, 1u) < gridDim.x - sums.rounders;
    smem.first_number = works ? atomicAdd(taken, 1u) : problem.block_tiles;
  }
  __syncthreads();
  return smem.first_number < problem.block_tiles;
}

// The box of queries that is number `number` in the order in which boxes are completed: as tiles,
// those of heads side by side come one after another.
template <typename Plan>
struct SumBox {
  int batch, head, begin;
  unsigned sum;  // as `turn_of` counts them

  __device__ SumBox(const HopperProblem<1>& problem, unsigned number) {
    const unsigned together = problem.side_by_side.divisor * problem.group_size.divisor;
    const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
    const unsigned group = number / (together * problem.head_sums);
    const unsigned inside = number - group * (together * problem.head_sums);
    const unsigned of_head = group * together + inside % together, place = inside / together;
    batch = of_head / heads, head = of_head % heads, begin = place * Plan::kColumns;
    sum = of_head * problem.head_sums + place;
  }
};

// Rounds sums by all threads of a block, a box for each warpgroup at a time, until none is left. A
// thread has what a consumer's thread had of the products.
template <typename Plan>
__device__ void round_sums(const HopperProblem<1>& problem, const Sums& sums,
                           const View<typename Plan::Element, 1>& grad_query,
                           SharedMemory<Plan>& smem) {
  const unsigned count = sums.count;
  constexpr int kAtATime = Plan::kWarpgroups + 1, kTiles = kLineElements / 8;
  const int w = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float4* all = reinterpret_cast<const float4*>(sums.sum);
  for (;;) {
    __syncthreads();  // all have read the last number
    if (threadIdx.x == 0) smem.first_number = atomicAdd(sums.rounded, kAtATime);
    __syncthreads();
    const unsigned number = smem.first_number + w;
    if (smem.first_number >= count) return;
    const SumBox<Plan> box(problem, number);
    if (thread == 0 && number < count) {
      const Range tiles = tiles_of<Plan>(problem, box.begin);
      while (load_acquire(sums.made + box.sum) != unsigned(tiles.end - tiles.begin)) {
      }
    }
    __syncthreads();
    if (number >= count) continue;
    float sum[Plan::kWarpgroups][kTiles][4];  // [lines of dQ]
    const float4* from = all + box.sum * (sizeof(smem.sum[0]) / sizeof(float4)) + thread;
#pragma unroll
    for (int i = 0; i < Plan::kWarpgroups * kTiles; ++i) {
      const float4 four = from[i * 128];
      auto& numbers = sum[i / kTiles][i % kTiles];
      numbers[0] = four.x, numbers[1] = four.y, numbers[2] = four.z, numbers[3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 2 * Plan::kWarpgroups; ++i) {
      const int line = i / 2, half = i % 2, first = line * kLineElements;
      const int token[1] = {box.begin + thread / 32 * 16 + thread % 32 / 4 + 8 * half};
      store_row(sum[line], half, problem.gradient_scale, thread % 4,
                grad_query.at(box.batch, token, box.head) + first, problem.head_dim - first,
                token[0] < problem.axes[0].length);
    }
  }
}

}  // namespace cuneigh::hopper
