// The gradient of the query: a group of lanes takes one query, walks over the keys that it sees,
// recomputes their weights from lse, and sums dQ = scale dS K. On the way it leaves
// delta = sum(dO * O) - grad_lse for the kernels of the other gradients.
//
// blockIdx.x: a box of queries of one batch and head; blockIdx.y: a slice of head_dim.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct BackwardQueryArguments : KeyMask<Plan> {
  ConstView<Plan> query, key;                          // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> value;                               // [batch, x1..xr, kv_heads, value_dim]
  ConstView<Plan> additional_keys, additional_values;  // [batch, n, kv_heads, dim], or null
  BiasView<Plan> rpb;                                  // [heads, 2 K - 1, ..], or null
  ConstView<Plan> grad_output, output;                 // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, grad_lse;                 // [batch, x1..xr, heads]; grad_lse or null
  NumberView<Plan> delta;                              // [batch, x1..xr, heads]
  OutputView<Plan> grad_query;                         // [batch, x1..xr, heads, head_dim]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    backward_query(const Problem<Plan::kRank> problem,
                   const BackwardQueryArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kKeys = 2;  // keys whose loads are in flight together

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int slice_size = problem.head_dim - slice;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(item.batch, item.token, item.head),
                                              problem.head_dim);  // [head_dim]
  const Held<ValueRow<Plan>, Plan::kWide> grad_output(
      arguments.grad_output.at(item.batch, item.token, item.head),
      problem.value_dim);  // [value_dim]

  // delta = sum(dO * O) - grad_lse
  Number delta =
      Lanes::sum(grad_output.dot(arguments.output.at(item.batch, item.token, item.head)));
  if (arguments.grad_lse.data) delta -= *arguments.grad_lse.at(item.batch, item.token, item.head);
  if (blockIdx.y == 0 && Lanes::lane() == 0)
    *arguments.delta.at(item.batch, item.token, item.head) = delta;

  const Number lse = finite_lse(*arguments.lse.at(item.batch, item.token, item.head));
  KeyRow<Plan> grad_query;  // [slice_size]

  // One line of keys [count, head_dim] and values [count, value_dim]
  auto attend = [&](const Element* key, long long key_stride, const Element* value,
                    long long value_stride, int count, auto bias, auto seen) {
    for (int begin = 0; begin < count; begin += kKeys) {
      KeyRow<Plan> row[kKeys];
      Number logit[kKeys] = {}, grad_weight[kKeys] = {};
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);
        if (!seen(neighbor)) continue;  // whose numbers may be anything
        row[i].load(key + neighbor * key_stride, problem.head_dim);
        logit[i] = query.dot(row[i], key + neighbor * key_stride);
        grad_weight[i] = grad_output.dot(value + neighbor * value_stride);
      }
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);
        // S = scale Q K^T + bias, P = exp(S - lse)
        logit[i] = scale * Lanes::sum(logit[i]) + bias(neighbor);
        const bool counts = begin + i < count && seen(neighbor);
        const Number weight = counts ? exponential(logit[i] - lse) : Number(0);
        if (Plan::kWide && seen(neighbor))
          row[i].load(key + neighbor * key_stride + slice, slice_size);
        // dP = dO V^T, dS = P (dP - delta), dQ += dS K
        grad_query.add(weight * (Lanes::sum(grad_weight[i]) - delta), row[i]);
      }
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long dilation = problem.axes[Plan::kRank - 1].dilation;
  for_each_line<false>(problem, item, window, [&](const Line<Plan::kRank>& line) {
    attend(arguments.key.at(item.batch, line.first, kv_head),
           dilation * arguments.key.token[Plan::kRank - 1],
           arguments.value.at(item.batch, line.first, kv_head),
           dilation * arguments.value.token[Plan::kRank - 1], line.count,
           bias_of<Plan, false>(problem, arguments.rpb, item.head, line),
           arguments.seen_in(problem, item.batch, line.first));
  });

  // The additional keys
  attend(
      arguments.additional_keys.at(item.batch, kv_head), arguments.additional_keys.token[0],
      arguments.additional_values.at(item.batch, kv_head), arguments.additional_values.token[0],
      problem.additional, [](int) { return Number(0); }, [](int) { return true; });

  grad_query.scale(scale);
  grad_query.store(arguments.grad_query.at(item.batch, item.token, item.head) + slice, slice_size);
}

}  // namespace cuneigh::naive
