// For every key the sum of the vectors of the queries that see it, under the weights that they give
// it (the inverse-neighborhood product): the gradient of value from weights and grad_output, and
// the gradient of key from the gradient of the logits and query.
//
// blockIdx.x: a box of keys of one (batch, key head); blockIdx.y: a slice of the dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct InverseArguments {
  ConstView<Plan> weights, rows;
  OutputView<Plan> output;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    inverse(const Problem<Plan::kRank> problem, const InverseArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<true>(problem, Lanes::member());
  if (!item.exists) return;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Axis& last = problem.axes[kLast];
  ValueRow<Plan> output;

  // Offset of this key in the window of the query at `index` along axis r
  auto offset_in = [&](int r, int index) {
    return item.place[r].index - problem.axes[r].window(index, item.place[r].group).begin;
  };

  Range inverse[Plan::kRank];
  inverse_of(problem, item, inverse);
  for (int member = 0; member < problem.group_size; ++member) {
    const int head = item.head * problem.group_size + member;
    for_each_line(problem, item, inverse, [&](const Line<Plan::kRank>& line) {
      int offset[Plan::kRank] = {};
#pragma unroll
      for (int r = 0; r < kLast; ++r) offset[r] = offset_in(r, item.place[r].index + line.shift[r]);
      const auto* weights = arguments.weights.at(item.batch, line.first, head) +
                            slot_of(problem, offset) * arguments.weights.inner;
      const auto* rows = arguments.rows.at(item.batch, line.first, head) + slice;
#pragma unroll 2
      for (int i = 0; i < line.count; ++i) {
        const int slot = offset_in(kLast, inverse[kLast].begin + i);
        ValueRow<Plan> row;
        row.load(rows, slice_size);
        output.add(convert<Number>(weights[slot * arguments.weights.inner]), row);
        weights += last.dilation * arguments.weights.token[kLast];
        rows += last.dilation * arguments.rows.token[kLast];
      }
    });
  }

  output.scale(Number(problem.scale));
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
}

}  // namespace cuneigh::naive
