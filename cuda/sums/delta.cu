// What the backward needs of every query beside its vectors: the logarithm that turns a logit in
// base 2 into a weight, and delta = sum(grad_output * output) - grad_lse.
//
// blockIdx.x: a box of queries of one (batch, head). The plan is that of the naive kernels.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct DeltaArguments {
  ConstView<Plan> grad_output, output;
  ConstNumberView<Plan> lse, grad_lse;  // grad_lse may be null
  View<float2, Plan::kRank> statistics;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    delta(const Problem<Plan::kRank> problem, const DeltaArguments<Plan> arguments) {
  using Lanes = Group<Plan::kLanes>;
  const auto item = item_of<false>(problem, Lanes::member());
  if (!item.exists) return;

  const Held<ValueRow<Plan>, Plan::kWide> grad_output(
      arguments.grad_output.at(item.batch, item.token, item.head), problem.value_dim);
  float delta = Lanes::sum(grad_output.dot(arguments.output.at(item.batch, item.token, item.head)));
  if (arguments.grad_lse.data) delta -= *arguments.grad_lse.at(item.batch, item.token, item.head);
  const float shift = finite_shift(*arguments.lse.at(item.batch, item.token, item.head));
  if (Lanes::lane() == 0)
    *arguments.statistics.at(item.batch, item.token, item.head) = {1.44269504f * shift, delta};
}

}  // namespace cuneigh::sums
