// What an hvp needs of every query beside its vectors, as `sums/delta` for a backward, and how it
// changes along tangents: {log2(e) lse, delta} and {lse', delta'} with
//
//   delta = sum(dO * O) - grad_lse    delta' = sum(dO * O' + dO' * O) - grad_lse'
//
// blockIdx.x: a box of queries of one batch and head.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct HvpDeltaArguments {
  ConstView<Plan> grad_output, output, d_output;       // [batch, x1..xr, heads, value_dim]
  ConstView<Plan> d_grad_output;                       // the same, or null
  ConstNumberView<Plan> lse, d_lse;                    // [batch, x1..xr, heads]
  ConstNumberView<Plan> grad_lse, d_grad_lse;          // [batch, x1..xr, heads], or null
  View<float2, Plan::kRank> statistics, d_statistics;  // [batch, x1..xr, heads]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    hvp_delta(const Problem<Plan::kRank> problem, const HvpDeltaArguments<Plan> arguments) {
  using Lanes = Group<Plan::kLanes>;
  using HeldValue = Held<ValueRow<Plan>, Plan::kWide>;
  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  auto of_item = [&](const auto& view) { return view.at(item.batch, item.token, item.head); };

  const HeldValue grad_output(of_item(arguments.grad_output), problem.value_dim);
  const HeldValue output(of_item(arguments.output), problem.value_dim);
  float delta = Lanes::sum(grad_output.dot(output.row, output.data));
  float d_delta = grad_output.dot(of_item(arguments.d_output));
  if (arguments.d_grad_output.data) d_delta += output.dot(of_item(arguments.d_grad_output));
  d_delta = Lanes::sum(d_delta);
  if (arguments.grad_lse.data) delta -= *of_item(arguments.grad_lse);
  if (arguments.d_grad_lse.data) d_delta -= *of_item(arguments.d_grad_lse);
  if (Lanes::lane() > 0) return;
  *of_item(arguments.statistics) = {kLog2E * finite_lse(*of_item(arguments.lse)), delta};
  *of_item(arguments.d_statistics) = {*of_item(arguments.d_lse), d_delta};
}

}  // namespace cuneigh::sums
