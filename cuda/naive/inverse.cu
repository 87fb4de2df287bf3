// For every key the sum of the vectors of the queries that see it, under the weights that they give
// it (the inverse-neighborhood product): dV = P^T dO, and dK = scale dS^T Q.
//
// blockIdx.x: a box of keys of one batch and key head; blockIdx.y: a slice of the dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct InverseArguments : KeyMask<Plan> {
  ConstView<Plan> weights;  // [batch, x1..xr, heads, slots]
  ConstView<Plan> vectors;  // [batch, x1..xr, heads, dim]
  OutputView<Plan> output;  // [batch, x1..xr, kv_heads, dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    inverse(const Problem<Plan::kRank> problem, const InverseArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<true>(problem, Lanes::index());
  if (!item.exists) return;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Axis& last = problem.axes[kLast];
  ValueRow<Plan> output;  // [slice_size]

  // The slot of this key among the logits of query `index` along axis r
  auto slot_in = [&](int r, int index) {
    const auto [group, own] = item.group_index[r];
    const Axis& axis = problem.axes[r];
    return axis.slot(own, axis.turned(index), axis.query_group(group));
  };

  Range inverse[Plan::kRank];
  inverse_of(problem, item, inverse);
  const int group_size = arguments.hides(item.batch, item.token) ? 0 : problem.group_size;
  for (int in_group = 0; in_group < group_size; ++in_group) {
    const int head = item.head * problem.group_size + in_group;
    for_each_line<true>(problem, item, inverse, [&](const Line<Plan::kRank>& line) {
      int offset[Plan::kRank] = {};
#pragma unroll
      for (int r = 0; r < kLast; ++r) offset[r] = slot_in(r, inverse[r].begin + line.offset[r]);
      const auto* weights = arguments.weights.at(item.batch, line.first, head) +
                            slot_of(problem, offset) * arguments.weights.inner;
      const auto* vectors = arguments.vectors.at(item.batch, line.first, head) + slice;
#pragma unroll 2
      for (int i = 0; i < line.count; ++i) {
        const int slot = slot_in(kLast, inverse[kLast].begin + line.offset[kLast] + i);
        ValueRow<Plan> row;
        row.load(vectors, slice_size);
        // dV += P^T dO
        output.add(convert<Number>(weights[slot * arguments.weights.inner]), row);
        weights += last.dilation * arguments.weights.token[kLast];
        vectors += last.dilation * arguments.vectors.token[kLast];
      }
    });
  }

  output.scale(Number(problem.scale));
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
}

}  // namespace cuneigh::naive
