// O = P V: the sum of the values of every query's window under given weights, additional values
// included (the neighborhood-neighborhood product). Slots of hidden keys are never read. It also
// computes dQ = scale dS K, with dS for weights and K for value.
//
// blockIdx.x: a box of queries of one batch and head; blockIdx.y: a slice of value_dim.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct AvArguments : KeyMask<Plan> {
  ConstView<Plan> weights;            // [batch, x1..xr, heads, slots]
  ConstView<Plan> value;              // [batch, x1..xr, kv_heads, value_dim]
  ConstView<Plan> additional_values;  // [batch, n, kv_heads, value_dim], or null
  OutputView<Plan> output;            // [batch, x1..xr, heads, value_dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    av(const Problem<Plan::kRank> problem, const AvArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Element* weights = arguments.weights.at(item.batch, item.token, item.head);
  const long long slot_stride = arguments.weights.inner;
  ValueRow<Plan> output;  // [slice_size]

  // O += P V for one line of weights [count] and values [count, value_dim]
  auto add = [&](const Element* weight, const Element* value, long long value_stride, int count,
                 auto seen) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      if (!seen(i)) continue;
      ValueRow<Plan> row;
      row.load(value + i * value_stride, slice_size);
      output.add(convert<Number>(weight[i * slot_stride]), row);
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  int before[Plan::kRank];
  window_of(problem, item, window);
  slots_before(problem, item, window, before);
  const long long value_stride = problem.axes[kLast].dilation * arguments.value.token[kLast];
  for_each_line<false>(problem, item, window, [&](const Line<Plan::kRank>& line) {
    int offset[Plan::kRank];
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) offset[r] = before[r] + line.offset[r];
    add(weights + slot_of(problem, offset) * slot_stride,
        arguments.value.at(item.batch, line.first, kv_head) + slice, value_stride, line.count,
        arguments.seen_in(problem, item.batch, line.first));
  });

  // The additional keys
  add(weights + window_size(problem) * slot_stride,
      arguments.additional_values.at(item.batch, kv_head) + slice,
      arguments.additional_values.token[0], problem.additional, [](int) { return true; });

  output.scale(Number(problem.scale));
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
}

}  // namespace cuneigh::naive
