// How the blocks of a cluster join what they have summed up for the rows of a tile, each over its
// share of the boxes of columns: O = P V, not divided by anything, m and sum(P), as in
// cuneigh/warp_softmax.cuh.
//
// The 8 rows that a warp holds in one half of its registers are a group. Blocks take turns at
// groups: each writes its sums of a group to the shared memory of the block that joins them, in the
// order in which its lanes have them. They are added in the order of the blocks.
#pragma once

#include "cuneigh/cluster.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/consumers.cuh"

namespace cuneigh::hopper {

// Those of a group over the boxes of each block.
template <typename Plan>
struct GroupSums {
  float2 output[Plan::kCluster][Plan::kValueColumns / 8][32];
  float2 statistics[Plan::kCluster][8];  // m and sum(P)
};

template <typename Plan>
constexpr int kGroups = 8 * Plan::kWarpgroups;
template <typename Plan>
constexpr int kOwnedGroups = (kGroups<Plan> + Plan::kCluster - 1) / Plan::kCluster;

// The sums that this block joins lie where its columns lay.
template <typename Plan>
__device__ GroupSums<Plan>* owned_sums(SharedMemory<Plan>& smem) {
  static_assert(kOwnedGroups<Plan> * sizeof(GroupSums<Plan>) <=
                    sizeof(smem.column_qk) + sizeof(smem.column_vo),
                "all sums have room there");
  return reinterpret_cast<GroupSums<Plan>*>(smem.column_qk);
}

// Gives the sums of this warp's rows to the blocks that join them.
template <typename Plan, int kTiles>
__device__ void give_sums(const Consumer<Plan>& me, const float (&output)[kTiles][4],
                          const WarpSoftmax<1>& softmax) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const int block = blockIdx.x % Plan::kCluster;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int group = 8 * me.w + 2 * warp + half, owner = group % Plan::kCluster;
    GroupSums<Plan>& sums = owned_sums(me.smem)[group / Plan::kCluster];
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      put(owner, &sums.output[block][i][lane],
          make_float2(output[i][2 * half], output[i][2 * half + 1]));
    const float sum = softmax.sum(0, half);
    if (me.quad == 0)
      put(owner, &sums.statistics[block][lane / 4], make_float2(softmax.row_max[0][half], sum));
  }
}

// Joins the sums of the groups whose turn is this block's: calls
// store(w, row, first, output, softmax, sum) with the row of warpgroup `w` that the quad of lanes
// has, its columns from `first` on, as they are after the last box, m and the sum of P.
template <typename Plan, typename Store>
__device__ void join_sums(SharedMemory<Plan>& smem, Store store) {
  constexpr int kColumns = 32, kParts = Plan::kValueColumns / kColumns;
  const int lane = threadIdx.x % 32, block = blockIdx.x % Plan::kCluster;
#pragma unroll 1
  for (int i = threadIdx.x / 32 - 4; i < kOwnedGroups<Plan> * kParts; i += 4 * Plan::kWarpgroups) {
    const int part = i % kParts, group = i / kParts * Plan::kCluster + block;
    if (group >= kGroups<Plan>) break;
    const GroupSums<Plan>& sums = owned_sums(smem)[i / kParts];
    WarpSoftmax<1> joined;
    float2 statistics[Plan::kCluster];
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      statistics[b] = sums.statistics[b][lane / 4];
      joined.row_max[0][0] = fmaxf(joined.row_max[0][0], statistics[b].x);
    }
    float output[kColumns / 8][4] = {}, sum = 0;
#pragma unroll
    for (int b = 0; b < Plan::kCluster; ++b) {
      const float factor = ex2_approx(statistics[b].x - joined.row_max[0][0]);
      sum += factor * statistics[b].y;
#pragma unroll
      for (int t = 0; t < kColumns / 8; ++t) {
        const float2 two = sums.output[b][part * kColumns / 8 + t][lane];
        output[t][0] += factor * two.x;
        output[t][1] += factor * two.y;
      }
    }
    const int row = group % 8 / 2 * 16 + group % 2 * 8 + lane / 4;
    store(group / 8, row, part * kColumns, output, joined, sum);
  }
}

}  // namespace cuneigh::hopper
