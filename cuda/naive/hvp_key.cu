// How the gradients of key and value change along tangents (cuneigh/hvp.cuh): a group of lanes
// takes one key, walks over the queries that see it (the inverse window, in every query head that
// shares the key), and sums dK' = scale (dS'^T Q + dS^T Q') and dV' = P'^T dO + P^T dO'. No
// atomics.
//
// blockIdx.x: a box of keys of one batch and key head; blockIdx.y: a slice of both head dimensions.

#include "cuneigh/hvp.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct HvpKeyArguments : HvpArguments<Plan> {
  OutputView<Plan> d_grad_key;    // [batch, x1..xr, kv_heads, head_dim]
  OutputView<Plan> d_grad_value;  // [batch, x1..xr, kv_heads, value_dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    hvp_key(const Problem<Plan::kRank> problem, const HvpKeyArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  using HeldKey = Held<KeyRow<Plan>, Plan::kWide, true>;
  using HeldValue = Held<ValueRow<Plan>, Plan::kWide, true>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<true>(problem, Lanes::index());
  if (!item.exists) return;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;
  const int key_slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int value_slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const Number scale = Number(problem.scale);
  const bool moves = arguments.d_grad_output.data;  // or dO' is 0
  auto of_item = [&](const auto& view) { return view.at(item.batch, item.token, item.head); };

  const HeldKey key(of_item(operands.key), problem.head_dim);
  const HeldKey d_key(of_item(tangents.key), problem.head_dim);
  const HeldValue value(of_item(operands.value), problem.value_dim);
  const HeldValue d_value(of_item(tangents.value), problem.value_dim);
  KeyRow<Plan> d_grad_key;      // a slice of it
  ValueRow<Plan> d_grad_value;  // a slice of it

  Range inverse[Plan::kRank];
  inverse_of(problem, item, inverse);
  const int dilation = problem.axes[kLast].dilation;
  const int group_size = arguments.hides(item.batch, item.token) ? 0 : problem.group_size;
  for (int in_group = 0; in_group < group_size; ++in_group) {
    const int head = item.head * problem.group_size + in_group;
    for_each_line<true>(problem, item, inverse, [&](const Line<Plan::kRank>& line) {
      const auto bias = bias_of<Plan, true>(problem, operands.rpb, head, line);
      const auto d_bias = bias_of<Plan, true>(problem, tangents.rpb, head, line);
      for (int i = 0; i < line.count; ++i) {
        int token[Plan::kRank];
#pragma unroll
        for (int r = 0; r < Plan::kRank; ++r) token[r] = line.first[r];
        token[kLast] += i * dilation;
        auto of_query = [&](const auto& view) { return view.at(item.batch, token, head); };

        const auto *query = of_query(operands.query), *d_query = of_query(tangents.query);
        KeyRow<Plan> query_row, d_query_row;
        query_row.load(query, problem.head_dim);
        d_query_row.load(d_query, problem.head_dim);
        const Number product = Lanes::sum(key.dot(query_row, query));
        const Number d_product =
            Lanes::sum(key.dot(d_query_row, d_query) + d_key.dot(query_row, query));
        const auto* grad_output = of_query(arguments.grad_output);
        const auto* d_grad_output = moves ? of_query(arguments.d_grad_output) : nullptr;
        ValueRow<Plan> grad_row, d_grad_row;
        grad_row.load(grad_output, problem.value_dim);
        if (moves) d_grad_row.load(d_grad_output, problem.value_dim);
        const Number grad_weight = Lanes::sum(value.dot(grad_row, grad_output));
        Number d_grad_weight = d_value.dot(grad_row, grad_output);
        if (moves) d_grad_weight += value.dot(d_grad_row, d_grad_output);
        d_grad_weight = Lanes::sum(d_grad_weight);

        const auto numbers = HvpQuery<Number>::of(arguments, item.batch, token, head);
        const HvpPair<Number> pair(numbers, scale * product + bias(i),
                                   scale * d_product + d_bias(i), grad_weight, d_grad_weight);
        if (Plan::kWide) {
          query_row.load(query + key_slice, problem.head_dim - key_slice);
          d_query_row.load(d_query + key_slice, problem.head_dim - key_slice);
          grad_row.load(grad_output + value_slice, problem.value_dim - value_slice);
          if (moves) d_grad_row.load(d_grad_output + value_slice, problem.value_dim - value_slice);
        }
        d_grad_key.add(pair.d_grad_logit, query_row);
        d_grad_key.add(pair.grad_logit, d_query_row);
        d_grad_value.add(pair.d_weight, grad_row);
        if (moves) d_grad_value.add(pair.weight, d_grad_row);
      }
    });
  }

  d_grad_key.scale(scale);
  d_grad_key.store(of_item(arguments.d_grad_key) + key_slice, problem.head_dim - key_slice);
  d_grad_value.store(of_item(arguments.d_grad_value) + value_slice,
                     problem.value_dim - value_slice);
}

}  // namespace cuneigh::naive
