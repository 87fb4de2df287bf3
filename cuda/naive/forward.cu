// Neighborhood attention by its definition: a group of lanes takes one query, walks over the keys
// that it sees and keeps a running softmax. Nothing of the size of the logits is stored.
//
// blockIdx.x: a box of queries of one (batch, head); blockIdx.y: a slice of the value's dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct ForwardArguments {
  ConstView<Plan> query, key, value, additional_keys, additional_values;
  BiasView<Plan> rpb;
  OutputView<Plan> output;
  NumberView<Plan> lse;  // may be null
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    forward(const Problem<Plan::kRank> problem, const ForwardArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kBatch = 4;  // keys whose loads are in flight together

  const auto item = item_of<false>(problem, Lanes::member());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(item.batch, item.token, item.head),
                                              problem.head_dim);
  ValueRow<Plan> output;
  Softmax<Number> softmax;

  // One line of keys: logits of a batch of them, their weights, and the weighted sum of the values
  auto attend = [&](const Element* key, long long key_step, const Element* value,
                    long long value_step, int count, auto bias) {
    for (int begin = 0; begin < count; begin += kBatch) {
      Number weight[kBatch];
      ValueRow<Plan> row[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int place = smaller(begin + i, count - 1);  // the last key again past the end
        weight[i] = query.dot(key + place * key_step);
        row[i].load(value + place * value_step, slice_size);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const Number logit = scale * Lanes::sum(weight[i]) + bias(smaller(begin + i, count - 1));
        weight[i] = begin + i < count ? logit : -infinity<Number>();
      }
      output.scale(softmax.update(weight));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) output.add(weight[i], row[i]);
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long dilation = problem.axes[Plan::kRank - 1].dilation;
  for_each_line(problem, item, window, [&](const Line<Plan::kRank>& line) {
    attend(arguments.key.at(item.batch, line.first, kv_head),
           dilation * arguments.key.token[Plan::kRank - 1],
           arguments.value.at(item.batch, line.first, kv_head) + slice,
           dilation * arguments.value.token[Plan::kRank - 1], line.count,
           bias_of<Plan, false>(problem, arguments.rpb, item.head, line));
  });

  // The additional keys
  attend(arguments.additional_keys.at(item.batch, kv_head), arguments.additional_keys.token[0],
         arguments.additional_values.at(item.batch, kv_head) + slice,
         arguments.additional_values.token[0], problem.additional, [](int) { return Number(0); });

  output.scale(softmax.normalizer());
  output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
  if (arguments.lse.data && blockIdx.y == 0 && Lanes::lane() == 0)
    *arguments.lse.at(item.batch, item.token, item.head) = softmax.lse();
}

}  // namespace cuneigh::naive
