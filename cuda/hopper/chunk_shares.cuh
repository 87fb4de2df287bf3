// How the blocks of a cluster join what they have of the queries of a tile, each from its share of
// the keys: O, rounded as a result is, and the statistics m and sum(P) of cuneigh/warp_softmax.cuh.
//
// The 8 queries that a warp holds in one half of its registers are a group. Blocks take turns at
// groups: each copies what it has of a group to the shared memory of the block that joins it. There
// shares are added in the order of the blocks. (Copies from block to block are slow, by measurement
// 14 bytes a cycle, hence half as many bytes as float32 has.)
#pragma once

#include "cuneigh/cluster.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/chunk.cuh"
#include "hopper/wgmma.cuh"

namespace cuneigh::hopper {

// What a block has of a group, as the lanes of a warp have it.
template <typename Plan>
struct alignas(16) GroupShare {
  unsigned output[Plan::kValueColumns / 8][32];  // two elements each
  float2 statistics[8];                          // m and sum(P)
};

// They lie where keys and values lay: what this block has of all groups, and what each block has of
// the groups that are this one's.
template <typename Plan>
struct ChunkShares {
  static constexpr int kGroups = 8 * Plan::kWarpgroups;
  static constexpr int kOwned = (kGroups + Plan::kCluster - 1) / Plan::kCluster;

  GroupShare<Plan> mine[kGroups];
  GroupShare<Plan> owned[kOwned][Plan::kCluster];

  __device__ static ChunkShares& in(ChunkMemory<Plan>& smem) {
    static_assert(sizeof(ChunkShares) <= sizeof(smem.key) + sizeof(smem.value), "they have room");
    return *reinterpret_cast<ChunkShares*>(smem.key);
  }
};

// Has the bytes of this block's groups counted. One thread calls it, before others give theirs.
template <typename Plan>
__device__ void expect_shares(ChunkMemory<Plan>& smem) {
  using Shares = ChunkShares<Plan>;
  const int block = blockIdx.x % Plan::kCluster;
  const int groups = (Shares::kGroups - block + Plan::kCluster - 1) / Plan::kCluster;
  smem.shares_full.arrive_and_expect(groups * Plan::kCluster * sizeof(GroupShare<Plan>));
}

// Gives what this warp has to the blocks that join it.
template <typename Plan, int kTiles>
__device__ void give_share(ChunkMemory<Plan>& smem, const float (&output)[kTiles][4],
                           const WarpSoftmax<1>& softmax) {
  auto& shares = ChunkShares<Plan>::in(smem);
  using Element = typename Plan::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int group = threadIdx.x / 32 * 2 + half;
    GroupShare<Plan>& mine = shares.mine[group];
    const float sum = softmax.sum(0, half), normalizer = softmax.normalizer(sum);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      mine.output[i][lane] =
          pack(output[i][2 * half] * normalizer, output[i][2 * half + 1] * normalizer, Element());
    if (lane % 4 == 0) mine.statistics[lane / 4] = make_float2(softmax.row_max[0][half], sum);
    fence_shared();
    __syncwarp();
    if (is_elected())
      copy_to_block(group % Plan::kCluster,
                    &shares.owned[group / Plan::kCluster][blockIdx.x % Plan::kCluster], &mine,
                    smem.shares_full);
  }
}

// Joins the shares of the groups whose turn is this block's: calls
// store(row, first, output, softmax, sum) with the row of all warpgroups that the quad of lanes has
// got, its columns from `first` on, as they are after the last box, m and the sum of P.
template <typename Plan, typename Store>
__device__ void join_shares(ChunkMemory<Plan>& smem, Store store) {
  using Shares = ChunkShares<Plan>;
  constexpr int kColumns = 32, kParts = Plan::kValueColumns / kColumns;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < Shares::kOwned * kParts; i += 4 * Plan::kWarpgroups) {
    const int part = i % kParts;
    const int group = i / kParts * Plan::kCluster + blockIdx.x % Plan::kCluster;
    if (group >= Shares::kGroups) break;
    const auto& shares = Shares::in(smem).owned[i / kParts];
    WarpSoftmax<1> joined;
    float2 statistics[Plan::kCluster];
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      statistics[b] = shares[b].statistics[lane / 4];
      joined.row_max[0][0] = fmaxf(joined.row_max[0][0], statistics[b].x);
    }
    float output[kColumns / 8][4] = {}, sum = 0;
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      const float weight = statistics[b].y * ex2_approx(statistics[b].x - joined.row_max[0][0]);
      sum += weight;
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) {
        const float2 two =
            unpack(shares[b].output[part * kColumns / 8 + t][lane], typename Plan::Element());
        output[t][0] += weight * two.x;
        output[t][1] += weight * two.y;
      }
    }
    store(group * 8 + lane / 4, part * kColumns, output, joined, sum);
  }
}

}  // namespace cuneigh::hopper
