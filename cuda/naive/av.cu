// The sum of the values of every query's window under given weights (the neighborhood-neighborhood
// product), additional values included. Hidden slots are never read. It also computes the gradient
// of query, with the gradient of the logits for weights and key for value.
//
// blockIdx.x: a box of queries of one (batch, head); blockIdx.y: a slice of the value's dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct AvArguments {
  ConstView<Plan> weights, value, additional_values;
  OutputView<Plan> output;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    av(const Problem<Plan::kRank> problem, const AvArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<false>(problem, Lanes::member());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Element* weights = arguments.weights.at(item.batch, item.token, item.head);
  const long long slot_step = arguments.weights.inner;
  ValueRow<Plan> output;

  auto add = [&](const Element* weight, const Element* value, long long value_step, int count) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      ValueRow<Plan> row;
      row.load(value + i * value_step, slice_size);
      output.add(convert<Number>(weight[i * slot_step]), row);
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long value_step = problem.axes[kLast].dilation * arguments.value.token[kLast];
  for_each_line(problem, item, window, [&](const Line<Plan::kRank>& line) {
    add(weights + slot_of(problem, line.offset) * slot_step,
        arguments.value.at(item.batch, line.first, kv_head) + slice, value_step, line.count);
  });

  // The additional keys
  add(weights + window_size(problem) * slot_step,
      arguments.additional_values.at(item.batch, kv_head) + slice,
      arguments.additional_values.token[0], problem.additional);

  output.scale(Number(problem.scale));
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
}

}  // namespace cuneigh::naive
