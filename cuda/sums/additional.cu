// For every additional key the sum of the vectors of all queries, under the weights that they give
// it: dV = P^T dO, and dK = scale dS^T Q. A block sums a share of the queries; `sums/shares` adds
// up the shares.
//
// blockIdx.x: share, batch, additional key and key head; blockIdx.y: a slice of the dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "sums/shares.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct AdditionalArguments {
  ConstView<Plan> weights;  // [batch, x1..xr, heads, slots]
  ConstView<Plan> vectors;  // [batch, x1..xr, heads, dim]
  NumberView<Plan> shares;  // [shares, batch, n, kv_heads, dim], contiguous
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    additional(const Problem<Plan::kRank> problem, const AdditionalArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;

  const Share share = share_of(problem);
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const long long slot = (window_size(problem) + share.key) * arguments.weights.inner;
  ValueRow<Plan> sum;  // [slice_size]

  for (int in_group = 0; in_group < problem.group_size; ++in_group) {
    const int head = share.kv_head * problem.group_size + in_group;
    const unsigned first = share.index * kGroups + Lanes::index();
    for_each_token(problem, first, share.count * kGroups, [&](const int (&token)[Plan::kRank]) {
      ValueRow<Plan> row;
      row.load(arguments.vectors.at(share.batch, token, head) + slice, slice_size);
      // dV += P^T dO
      sum.add(convert<Number>(arguments.weights.at(share.batch, token, head)[slot]), row);
    });
  }

  sum.scale(Number(problem.scale));
  store_block_sum<Plan::kThreads>(
      sum, arguments.shares.data + share.row * problem.value_dim + slice, slice_size);
}

}  // namespace cuneigh::sums
