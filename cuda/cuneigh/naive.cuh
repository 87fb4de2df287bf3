// What the naive kernels share: the types that a plan implies, and the relative positional bias.
//
// struct Plan {
//   static constexpr int kRank;         token axes
//   static constexpr int kThreads;      threads of a block
//   static constexpr int kLanes;        lanes that share one token
//   static constexpr int kKeyVector;    elements of query and key vectors that move together
//   static constexpr int kKeyChunks;    such packets that a lane holds
//   static constexpr bool kKeyExact;    their dimension fills those packets exactly
//   kValueVector, kValueChunks, kValueExact: the same for value vectors
//   static constexpr bool kWide;        a vector may be longer than its Row
//   using Element;                      dtype of the tensors
//   using Bias;                         dtype of rpb, or void when there is none
// };
#pragma once

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh {

template <typename Plan>
using KeyRow =
    Row<typename Plan::Element, Plan::kKeyVector, Plan::kLanes, Plan::kKeyChunks, Plan::kKeyExact>;
template <typename Plan>
using ValueRow = Row<typename Plan::Element, Plan::kValueVector, Plan::kLanes, Plan::kValueChunks,
                     Plan::kValueExact>;

template <typename Plan>
using ConstView = View<const typename Plan::Element, Plan::kRank>;
template <typename Plan>
using OutputView = View<typename Plan::Element, Plan::kRank>;
template <typename Plan>
using NumberView = View<Accumulator<typename Plan::Element>, Plan::kRank>;
template <typename Plan>
using ConstNumberView = View<const Accumulator<typename Plan::Element>, Plan::kRank>;
template <typename Plan>
using BiasView = View<const typename Plan::Bias, Plan::kRank>;

// The bias of every pair of a line, as a function of the neighbor's place in the line. On each axis
// rpb is indexed by key less query plus kernel_size - 1; kKeys says that the item is the key and
// the neighbors are queries.
template <typename Plan, bool kKeys>
__device__ auto bias_of(const Problem<Plan::kRank>& problem, const BiasView<Plan>& rpb, int head,
                        const Line<Plan::kRank>& line) {
  using Number = Accumulator<typename Plan::Element>;
  if constexpr (kSame<typename Plan::Bias, void>) {
    return [](int) { return Number(0); };
  } else {
    constexpr int kSign = kKeys ? -1 : 1;
    int relative[Plan::kRank];
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      relative[r] = kSign * line.shift[r] + problem.axes[r].kernel_size - 1;
    const auto* first = rpb.at(0, relative, head);
    const long long step = kSign * rpb.token[Plan::kRank - 1];
    return [first, step](int i) { return convert<Number>(first[i * step]); };
  }
}

// What a block of the kernels over additional keys works on.
struct Share {
  int batch, kv_head, key;
  unsigned index, count;  // which share of the queries, out of how many
  long long row;          // place of the result among [shares, batch, n, kv_heads]
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

// Slot in a row of logits of the key at the given offsets from the window's begin.
template <int kRank>
__device__ long long slot_of(const Problem<kRank>& problem, const int (&offset)[kRank]) {
  long long slot = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) slot = slot * problem.axes[r].kernel_size + offset[r];
  return slot;
}

template <int kRank>
__device__ long long window_size(const Problem<kRank>& problem) {
  long long size = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) size *= problem.axes[r].kernel_size;
  return size;
}

}  // namespace cuneigh
