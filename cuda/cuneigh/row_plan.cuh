// What a plan says to a kernel that gives every token to a group of lanes: the types of its vectors
// and tensors, and the relative positional bias. `RowPlan` of cuneigh/_gpu/rows.py writes the plan:
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
//   static constexpr bool kKeyMask;     keys may be hidden
//   using Element;                      dtype of the tensors
//   using Bias;                         dtype of rpb, or void when there is none
// };
#pragma once

#include "cuneigh/key_mask.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh {

template <typename Plan>
using KeyRow =
    Row<typename Plan::Element, Plan::kKeyVector, Plan::kLanes, Plan::kKeyChunks, Plan::kKeyExact>;
template <typename Plan>
using ValueRow = Row<typename Plan::Element, Plan::kValueVector, Plan::kLanes, Plan::kValueChunks,
                     Plan::kValueExact>;

// Tensors of elements, and of the precision of sums.
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

// The bias of every pair of a line, as a function of the neighbor's number in the line. On each
// axis rpb [heads, 2 K - 1, ..] is indexed by key less query plus kernel_size - 1. kKeys says that
// the item is the key and the neighbors are queries.
template <typename Plan, bool kKeys>
__device__ auto bias_of(const Problem<Plan::kRank>& problem, const BiasView<Plan>& rpb, int head,
                        const Line<Plan::kRank>& line) {
  using Number = Accumulator<typename Plan::Element>;
  if constexpr (kSame<typename Plan::Bias, void>) {
    return [](int) { return Number(0); };
  } else {
    constexpr int kSign = kKeys ? -1 : 1;
    int index[Plan::kRank];
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      index[r] = kSign * line.relative[r] + problem.axes[r].kernel_size - 1;
    const auto* first = rpb.at(0, index, head);
    const long long stride = kSign * rpb.token[Plan::kRank - 1];
    return [first, stride](int i) { return convert<Number>(first[i * stride]); };
  }
}

}  // namespace cuneigh
