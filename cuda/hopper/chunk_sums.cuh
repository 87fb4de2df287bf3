// How the blocks of a cluster join what they have summed up for the queries of a tile, each over
// its share of the keys: O = P V, not divided by anything, m and sum(P), as in
// cuneigh/warp_softmax.cuh.
//
// The 8 queries that a warp holds in one half of its registers are a group. Blocks take turns at
// groups: each copies its sums of a group to the shared memory of the block that joins them. There
// they are added in the order of the blocks.
#pragma once

#include "cuneigh/cluster.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/chunk.cuh"

namespace cuneigh::hopper {

// Those of a group, as the lanes of a warp have them.
template <typename Plan>
struct alignas(16) GroupSums {
  float2 output[Plan::kValueColumns / 8][32];
  float2 statistics[8];  // m and sum(P)
};

// The sums of a cluster lie where its keys and values lay: those of all groups over this block's
// boxes, and those of this block's groups over the boxes of each block.
template <typename Plan>
struct ChunkSums {
  static constexpr int kGroups = 8 * Plan::kWarpgroups;
  static constexpr int kOwned = (kGroups + Plan::kCluster - 1) / Plan::kCluster;

  GroupSums<Plan> mine[kGroups];
  GroupSums<Plan> owned[kOwned][Plan::kCluster];

  __device__ static ChunkSums& in(ChunkMemory<Plan>& smem) {
    static_assert(sizeof(ChunkSums) <= sizeof(smem.key) + sizeof(smem.value), "they have room");
    return *reinterpret_cast<ChunkSums*>(smem.key);
  }
};

// Has the sums of this block's groups counted. One thread calls it, before others give theirs.
template <typename Plan>
__device__ void expect_sums(ChunkMemory<Plan>& smem) {
  using Sums = ChunkSums<Plan>;
  const int block = blockIdx.x % Plan::kCluster;
  const int groups = (Sums::kGroups - block + Plan::kCluster - 1) / Plan::kCluster;
  smem.sums_full.arrive_and_expect(groups * Plan::kCluster * sizeof(GroupSums<Plan>));
}

// Gives the sums of this warp's rows to the blocks that join them.
template <typename Plan, int kTiles>
__device__ void give_sums(ChunkMemory<Plan>& smem, const float (&output)[kTiles][4],
                          const WarpSoftmax<1>& softmax) {
  auto& sums = ChunkSums<Plan>::in(smem);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int group = threadIdx.x / 32 * 2 + half;
    GroupSums<Plan>& mine = sums.mine[group];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      mine.output[i][lane] = make_float2(output[i][2 * half], output[i][2 * half + 1]);
    const float sum = softmax.sum(0, half);
    if (lane % 4 == 0) mine.statistics[lane / 4] = make_float2(softmax.row_max[0][half], sum);
    fence_shared();
    __syncwarp();
    if (is_elected())
      copy_to_block(group % Plan::kCluster,
                    &sums.owned[group / Plan::kCluster][blockIdx.x % Plan::kCluster], &mine,
                    smem.sums_full);
  }
}

// Joins the sums of the groups whose turn is this block's: calls
// store(row, first, output, softmax, sum) with the row of all warpgroups that the quad of lanes has
// got, its columns from `first` on, as they are after the last box, m and the sum of P.
template <typename Plan, typename Store>
__device__ void join_sums(ChunkMemory<Plan>& smem, Store store) {
  using Sums = ChunkSums<Plan>;
  constexpr int kColumns = 32, kParts = Plan::kValueColumns / kColumns;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < Sums::kOwned * kParts; i += 4 * Plan::kWarpgroups) {
    const int part = i % kParts;
    const int group = i / kParts * Plan::kCluster + blockIdx.x % Plan::kCluster;
    if (group >= Sums::kGroups) break;
    const auto& sums = Sums::in(smem).owned[i / kParts];
    WarpSoftmax<1> joined;
    float2 statistics[Plan::kCluster];
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      statistics[b] = sums[b].statistics[lane / 4];
      joined.row_max[0][0] = fmaxf(joined.row_max[0][0], statistics[b].x);
    }
    float output[kColumns / 8][4] = {}, sum = 0;
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      const float factor = ex2_approx(statistics[b].x - joined.row_max[0][0]);
      sum += factor * statistics[b].y;
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) {
        const float2 two = sums[b].output[part * kColumns / 8 + t][lane];
        output[t][0] += factor * two.x;
        output[t][1] += factor * two.y;
      }
    }
    store(group * 8 + lane / 4, part * kColumns, output, joined, sum);
  }
}

}  // namespace cuneigh::hopper
