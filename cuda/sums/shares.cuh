// Which share of which sum over all queries a block computes, for the additional keys.
#pragma once

#include "cuneigh/layout.cuh"

namespace cuneigh::sums {

struct Share {
  int batch, kv_head, key;
  unsigned index, count;  // which share of the queries, out of how many
  long long row;          // where the result goes among [shares, batch, n, kv_heads]
};

template <int kRank>
__device__ Share share_of(const Problem<kRank>& problem) {
  const unsigned kv_heads = problem.heads / problem.group_size;
  const unsigned rows = problem.batch * problem.additional * kv_heads;
  const unsigned row = blockIdx.x % rows;
  Share share;
  share.index = blockIdx.x / rows;
  share.count = gridDim.x / rows;
  share.kv_head = row % kv_heads;
  share.key = row / kv_heads % problem.additional;
  share.batch = row / kv_heads / problem.additional;
  share.row = blockIdx.x;
  return share;
}

}  // namespace cuneigh::sums
