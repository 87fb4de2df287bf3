// The gradients of key and value: a group of lanes takes one key, walks over the queries that see
// it (the inverse window, in every query head that shares the key), recomputes their weights from
// lse, and sums dK = scale * dS^T Q and dV = P^T dO. No atomics: the sums are the same in each run.
//
// blockIdx.x: a box of keys of one (batch, key head); blockIdx.y: a slice of both head dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct BackwardKeyArguments {
  ConstView<Plan> query, key, value;
  BiasView<Plan> rpb;
  ConstView<Plan> grad_output;
  ConstNumberView<Plan> lse, delta;
  OutputView<Plan> grad_key, grad_value;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    backward_key(const Problem<Plan::kRank> problem, const BackwardKeyArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;

  const auto item = item_of<true>(problem, Lanes::member());
  if (!item.exists) return;
  const int key_slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int value_slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> key(arguments.key.at(item.batch, item.token, item.head),
                                            problem.head_dim);
  const Held<ValueRow<Plan>, Plan::kWide> value(
      arguments.value.at(item.batch, item.token, item.head), problem.value_dim);
  KeyRow<Plan> grad_key;
  ValueRow<Plan> grad_value;

  Range inverse[Plan::kRank];
  inverse_of(problem, item, inverse);
  const long long dilation = problem.axes[kLast].dilation;
  for (int member = 0; member < problem.group_size; ++member) {
    const int head = item.head * problem.group_size + member;
    for_each_line(problem, item, inverse, [&](const Line<Plan::kRank>& line) {
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
        const Number logit = scale * Lanes::sum(key.dot(query_row, query)) + bias(i);
        const Number weight = exponential(logit - finite_shift(*lse));
        const Number grad_weight = Lanes::sum(value.dot(grad_row, grad_output));
        if (Plan::kWide) {
          query_row.load(query + key_slice, problem.head_dim - key_slice);
          grad_row.load(grad_output + value_slice, problem.value_dim - value_slice);
        }
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
