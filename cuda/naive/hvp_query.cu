// How the gradient of the query changes along tangents (cuneigh/hvp.cuh): a group of lanes takes
// one query, walks over the keys that it sees, and sums dQ' = scale (dS' K + dS K'). On the way it
// leaves
//
//   delta = sum(dO * O) - grad_lse    delta' = sum(dO * O' + dO' * O) - grad_lse'
//
// for the kernels of the other gradients.
//
// blockIdx.x: a box of queries of one batch and head; blockIdx.y: a slice of head_dim.

#include "cuneigh/hvp.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct HvpQueryArguments : HvpArguments<Plan> {
  ConstView<Plan> output, d_output;            // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> grad_lse, d_grad_lse;  // [batch, x1..xr, heads], or null
  OutputView<Plan> d_grad_query;               // [batch, x1..xr, heads, head_dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    hvp_query(const Problem<Plan::kRank> problem, const HvpQueryArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  using HeldKey = Held<KeyRow<Plan>, Plan::kWide, true>;
  using HeldValue = Held<ValueRow<Plan>, Plan::kWide, true>;

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int slice_size = problem.head_dim - slice;
  const Number scale = Number(problem.scale);
  auto of_item = [&](const auto& view) { return view.at(item.batch, item.token, item.head); };

  const HeldKey query(of_item(operands.query), problem.head_dim);
  const HeldKey d_query(of_item(tangents.query), problem.head_dim);
  const HeldValue grad_output(of_item(arguments.grad_output), problem.value_dim);
  const bool moves = arguments.d_grad_output.data;  // or dO' is 0
  const HeldValue d_grad_output(of_item(moves ? arguments.d_grad_output : arguments.grad_output),
                                problem.value_dim);

  // delta and delta'
  const Element* output = of_item(arguments.output);
  Number delta = Lanes::sum(grad_output.dot(output));
  Number d_delta = grad_output.dot(of_item(arguments.d_output));
  if (moves) d_delta += d_grad_output.dot(output);
  d_delta = Lanes::sum(d_delta);
  if (arguments.grad_lse.data) delta -= *of_item(arguments.grad_lse);
  if (arguments.d_grad_lse.data) d_delta -= *of_item(arguments.d_grad_lse);
  if (blockIdx.y == 0 && Lanes::lane() == 0) {
    *of_item(arguments.delta) = delta;
    *of_item(arguments.d_delta) = d_delta;
  }

  const HvpQuery<Number> numbers = {finite_lse(*of_item(arguments.lse)), *of_item(arguments.d_lse),
                                    delta, d_delta};
  KeyRow<Plan> d_grad_query;  // [slice_size]

  // One line of keys [count, head_dim] and values [count, value_dim], and of their tangents
  struct Vectors {
    const Element* first;
    long long stride;
    __device__ const Element* at(int i) const { return first + i * stride; }
  };
  auto attend = [&](Vectors keys, Vectors d_keys, Vectors values, Vectors d_values, int count,
                    auto bias, auto d_bias, auto seen) {
    for (int i = 0; i < count; ++i) {
      if (!seen(i)) continue;
      const Element *key = keys.at(i), *d_key = d_keys.at(i), *value = values.at(i);
      KeyRow<Plan> key_row, d_key_row;
      key_row.load(key, problem.head_dim);
      d_key_row.load(d_key, problem.head_dim);
      const Number product = Lanes::sum(query.dot(key_row, key));
      const Number d_product = Lanes::sum(d_query.dot(key_row, key) + query.dot(d_key_row, d_key));
      ValueRow<Plan> value_row;
      value_row.load(value, problem.value_dim);
      const Number grad_weight = Lanes::sum(grad_output.dot(value_row, value));
      Number d_grad_weight = grad_output.dot(d_values.at(i));
      if (moves) d_grad_weight += d_grad_output.dot(value_row, value);
      d_grad_weight = Lanes::sum(d_grad_weight);

      const HvpPair<Number> pair(numbers, scale * product + bias(i), scale * d_product + d_bias(i),
                                 grad_weight, d_grad_weight);
      if (Plan::kWide) {
        key_row.load(key + slice, slice_size);
        d_key_row.load(d_key + slice, slice_size);
      }
      d_grad_query.add(pair.d_grad_logit, key_row);
      d_grad_query.add(pair.grad_logit, d_key_row);
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long dilation = problem.axes[Plan::kRank - 1].dilation;
  for_each_line<false>(problem, item, window, [&](const Line<Plan::kRank>& line) {
    auto vectors = [&](const ConstView<Plan>& view) -> Vectors {
      return {view.at(item.batch, line.first, kv_head), dilation * view.token[Plan::kRank - 1]};
    };
    attend(vectors(operands.key), vectors(tangents.key), vectors(operands.value),
           vectors(tangents.value), line.count,
           bias_of<Plan, false>(problem, operands.rpb, item.head, line),
           bias_of<Plan, false>(problem, tangents.rpb, item.head, line),
           arguments.seen_in(problem, item.batch, line.first));
  });

  // The additional keys
  auto additional = [&](const ConstView<Plan>& view) -> Vectors {
    return {view.at(item.batch, kv_head), view.token[0]};
  };
  auto no_bias = [](int) { return Number(0); };
  attend(additional(operands.additional_keys), additional(tangents.additional_keys),
         additional(operands.additional_values), additional(tangents.additional_values),
         problem.additional, no_bias, no_bias, [](int) { return true; });

  d_grad_query.scale(scale);
  d_grad_query.store(of_item(arguments.d_grad_query) + slice, slice_size);
}

}  // namespace cuneigh::naive
