// For every additional key the sum of the vectors of all queries under the weights that they give
// it: the gradient of additional_values from weights and grad_output, and the gradient of
// additional_keys from the gradient of the logits and query. A block sums a share of the queries;
// the shares are added up by naive_sum.
//
// blockIdx.x: (batch, key head, additional key, share); blockIdx.y: a slice of the dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct AdditionalArguments {
  ConstView<Plan> weights, rows;
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
  ValueRow<Plan> sum;

  for (int member = 0; member < problem.group_size; ++member) {
    const int head = share.kv_head * problem.group_size + member;
    const unsigned first = share.index * kGroups + Lanes::member();
    for_each_token(problem, first, share.count * kGroups, [&](const int (&token)[Plan::kRank]) {
      ValueRow<Plan> row;
      row.load(arguments.rows.at(share.batch, token, head) + slice, slice_size);
      sum.add(convert<Number>(arguments.weights.at(share.batch, token, head)[slot]), row);
    });
  }

  sum.scale(Number(problem.scale));
  store_block_sum<Plan::kThreads>(
      sum, arguments.shares.data + share.row * problem.value_dim + slice, slice_size);
}

}  // namespace cuneigh::sums
