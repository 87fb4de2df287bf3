// Neighborhood attention by its definition: a group of lanes takes one query, walks over the keys
// that it sees, and keeps a running softmax. Nothing of the size of the logits is stored.
//
// blockIdx.x: a box of queries of one batch and head; blockIdx.y: a slice of value_dim.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct ForwardArguments : KeyMask<Plan> {
  ConstView<Plan> query, key;                          // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> value;                               // [batch, x1..xr, kv_heads, value_dim]
  ConstView<Plan> additional_keys, additional_values;  // [batch, n, kv_heads, dim], or null
  BiasView<Plan> rpb;                                  // [heads, 2 K - 1, ..], or null
  OutputView<Plan> output;                             // [batch, x1..xr, heads, value_dim]
  NumberView<Plan> lse;                                // [batch, x1..xr, heads], or null
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    forward(const Problem<Plan::kRank> problem, const ForwardArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kKeys = 4;  // keys whose loads are in flight together

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(item.batch, item.token, item.head),
                                              problem.head_dim);  // [head_dim]
  ValueRow<Plan> output;                                          // [slice_size]
  Softmax<Number> softmax;

  // One line of keys [count, head_dim] and values [count, value_dim]
  auto attend = [&](const Element* key, long long key_stride, const Element* value,
                    long long value_stride, int count, auto bias, auto seen) {
    for (int begin = 0; begin < count; begin += kKeys) {
      Number logit[kKeys] = {};
      ValueRow<Plan> row[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);  // the last key again past the end
        if (!seen(neighbor)) continue;                       // whose numbers may be anything
        logit[i] = query.dot(key + neighbor * key_stride);
        row[i].load(value + neighbor * value_stride, slice_size);
      }

      // S = scale Q K^T + bias
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);
        const Number sum = scale * Lanes::sum(logit[i]) + bias(neighbor);
        logit[i] = begin + i < count && seen(neighbor) ? sum : -infinity<Number>();
      }

      // P = exp(S - max), O = O rescaled + P V
      output.scale(softmax.update(logit));
#pragma unroll
      for (int i = 0; i < kKeys; ++i) output.add(logit[i], row[i]);
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long dilation = problem.axes[Plan::kRank - 1].dilation;
  for_each_line<false>(problem, item, window, [&](const Line<Plan::kRank>& line) {
    attend(arguments.key.at(item.batch, line.first, kv_head),
           dilation * arguments.key.token[Plan::kRank - 1],
           arguments.value.at(item.batch, line.first, kv_head) + slice,
           dilation * arguments.value.token[Plan::kRank - 1], line.count,
           bias_of<Plan, false>(problem, arguments.rpb, item.head, line),
           arguments.seen_in(problem, item.batch, line.first));
  });

  // The additional keys
  attend(
      arguments.additional_keys.at(item.batch, kv_head), arguments.additional_keys.token[0],
      arguments.additional_values.at(item.batch, kv_head) + slice,
      arguments.additional_values.token[0], problem.additional, [](int) { return Number(0); },
      [](int) { return true; });

  // O / sum(P), lse
  output.scale(softmax.normalizer());
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
  if (arguments.lse.data && blockIdx.y == 0 && Lanes::lane() == 0)
    *arguments.lse.at(item.batch, item.token, item.head) = softmax.lse();
}

}  // namespace cuneigh::naive
