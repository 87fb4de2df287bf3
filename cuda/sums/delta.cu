// What a backward needs of every query beside its vectors: log2(e) lse, which a logit in base 2
// less is the logarithm of a weight, and delta = sum(dO * O) - grad_lse. If Plan::kUnits also the
// units of sums in fixed point (units.cuh).
//
// blockIdx.x: a box of queries of one batch and head.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"
#include "sums/units.cuh"

namespace cuneigh::sums {

template <typename Plan, bool kUnits>
struct MoreDeltaArguments {};
template <typename Plan>
struct MoreDeltaArguments<Plan, true> : UnitArguments<Plan::kRank> {};

template <typename Plan>
struct DeltaOperands {
  ConstView<Plan> grad_output, output;   // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, grad_lse;   // [batch, x1..xr, heads]; grad_lse or null
  View<float2, Plan::kRank> statistics;  // [batch, x1..xr, heads]
};
template <typename Plan>
struct DeltaArguments : DeltaOperands<Plan>, MoreDeltaArguments<Plan, Plan::kUnits> {};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    delta(const Problem<Plan::kRank> problem, const DeltaArguments<Plan> arguments) {
  using Lanes = Group<Plan::kLanes>;
  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;

  const Held<ValueRow<Plan>, Plan::kWide> grad_output(
      arguments.grad_output.at(item.batch, item.token, item.head),
      problem.value_dim);  // [value_dim]
  float delta = Lanes::sum(grad_output.dot(arguments.output.at(item.batch, item.token, item.head)));
  if (arguments.grad_lse.data) delta -= *arguments.grad_lse.at(item.batch, item.token, item.head);
  const float lse = finite_lse(*arguments.lse.at(item.batch, item.token, item.head));
  if (Lanes::lane() == 0)
    *arguments.statistics.at(item.batch, item.token, item.head) = {kLog2E * lse, delta};
  if constexpr (Plan::kUnits) {
    const float sum = Lanes::sum(grad_output.magnitude(1.0f / 256));
    if (Lanes::lane() == 0)
      *arguments.units.at(item.batch, item.token, item.head) =
          units_of(sum, delta, magnitudes_of(problem, arguments, item));
  }
}

}  // namespace cuneigh::sums
