// The gradients of key and value: a group of lanes takes one key, walks over the queries that see
// it (the inverse window, in every query head that shares the key), recomputes their weights from
// lse, and sums dK = scale dS^T Q and dV = P^T dO. No atomics: the sums are the same in every run.
//
// blockIdx.x: a box of keys of one batch and key head; blockIdx.y: a slice of both head dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct BackwardKeyArguments : KeyMask<Plan> {
  ConstView<Plan> query, key;        // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> value;             // [batch, x1..xr, kv_heads, value_dim]
  BiasView<Plan> rpb;                // [heads, 2 K - 1, ..], or null
  ConstView<Plan> grad_output;       // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, delta;  // [batch, x1..xr, heads]
  OutputView<Plan> grad_key;         // [batch, x1..xr, kv_heads, head_dim]
  OutputView<Plan> grad_value;       // [batch, x1..xr, kv_heads, value_dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    backward_key(const Problem<Plan::kRank> problem, const BackwardKeyArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<true>(problem, Lanes::index());
  if (!item.exists) return;
  const int key_slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int value_slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> key(arguments.key.at(item.batch, item.token, item.head),
                                            problem.head_dim);  // [head_dim]
  const Held<ValueRow<Plan>, Plan::kWide> value(
      arguments.value.at(item.batch, item.token, item.head), problem.value_dim);  // [value_dim]
  KeyRow<Plan> grad_key;                                                          // a slice of it
  ValueRow<Plan> grad_value;                                                      // a slice of it

  Range inverse[Plan::kRank];
  inverse_of(problem, item, inverse);
  const long long dilation = problem.axes[kLast].dilation;
  const int group_size = arguments.hides(item.batch, item.token) ? 0 : problem.group_size;
  for (int in_group = 0; in_group < group_size; ++in_group) {
    const int head = item.head * problem.group_size + in_group;
    for_each_line<true>(problem, item, inverse, [&](const Line<Plan::kRank>& line) {
      const auto* query = arguments.query.at(item.batch, line.first, head);
      const auto* grad_output = arguments.grad_output.at(item.batch, line.first, head);
      const Number* lse = arguments.lse.at(item.batch, line.first, head);
      const Number* delta = arguments.delta.at(item.batch, line.first, head);
      const auto bias = bias_of<Plan, true>(problem, arguments.rpb, head, line);
#pragma unroll 2
      for (int i = 0; i < line.count; ++i) {
        KeyRow<Plan> query_row;
        ValueRow<Plan> grad_row;
        query_row.load(query, problem.head_dim);
        grad_row.load(grad_output, problem.value_dim);
        // S = scale Q K^T + bias, P = exp(S - lse), dP = dO V^T
        const Number logit = scale * Lanes::sum(key.dot(query_row, query)) + bias(i);
        const Number weight = exponential(logit - finite_lse(*lse));
        const Number grad_weight = Lanes::sum(value.dot(grad_row, grad_output));
        if (Plan::kWide) {
          query_row.load(query + key_slice, problem.head_dim - key_slice);
          grad_row.load(grad_output + value_slice, problem.value_dim - value_slice);
        }
        // dS = P (dP - delta), dK += dS^T Q, dV += P^T dO
        grad_key.add(weight * (grad_weight - *delta), query_row);
        grad_value.add(weight, grad_row);
        query += dilation * arguments.query.token[kLast];
        grad_output += dilation * arguments.grad_output.token[kLast];
        lse += dilation * arguments.lse.token[kLast];
        delta += dilation * arguments.delta.token[kLast];
      }
    });
  }

  grad_key.scale(scale);
  grad_key.store(arguments.grad_key.at(item.batch, item.token, item.head) + key_slice,
                 problem.head_dim - key_slice);
  grad_value.store(arguments.grad_value.at(item.batch, item.token, item.head) + value_slice,
                   problem.value_dim - value_slice);
}

}  // namespace cuneigh::naive
