// S = scale Q K^T + rpb: the logits of every query with the keys of its window, one slot for each,
// then those of the additional keys (the pointwise-neighborhood product). It also computes
// dP = dO V^T, with dO for query and V for key.
//
// blockIdx.x: a box of queries of one batch and head.

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct QkArguments : KeyMask<Plan> {
  ConstView<Plan> query, key;       // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> additional_keys;  // [batch, n, kv_heads, head_dim], or null
  BiasView<Plan> rpb;               // [heads, 2 K - 1, ..], or null
  OutputView<Plan> logits;          // [batch, x1..xr, heads, slots]
};

// Plan::kHiddenIsZero: whether the slot of a hidden key, such as one past a causal end, gets 0 (as
// gradients do) or -inf (as logits do).
template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    qk(const Problem<Plan::kRank> problem, const QkArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kLast = Plan::kRank - 1;
  constexpr int kKeys = 4;  // keys whose loads are in flight together

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const int kv_head = item.head / problem.group_size;
  const Number scale = Number(problem.scale);
  const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(item.batch, item.token, item.head),
                                              problem.head_dim);  // [head_dim]
  Element* logits = arguments.logits.at(item.batch, item.token, item.head);

  // One line of slots [slots], whose keys are key(i) [head_dim] where seen(i). The lanes take turns
  // in writing.
  auto multiply = [&](auto key, auto seen, int slots, auto bias) {
    for (int begin = 0; begin < slots; begin += kKeys) {
      Number logit[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i)
        logit[i] = seen(begin + i) ? query.dot(key(begin + i)) : Number(0);
      // S = scale Q K^T + bias
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        logit[i] = scale * Lanes::sum(logit[i]);
        if (seen(begin + i))
          logit[i] += bias(begin + i);
        else
          logit[i] = Plan::kHiddenIsZero ? Number(0) : -infinity<Number>();
        if (Lanes::lane() == i % Plan::kLanes && begin + i < slots)
          logits[(begin + i) * arguments.logits.inner] = convert<Element>(logit[i]);
      }
    }
    logits += slots * arguments.logits.inner;
  };

  // All slots of the window, line by line
  const long long key_stride = problem.axes[kLast].dilation * arguments.key.token[kLast];
  Range window[Plan::kRank];
  window_of(problem, item, window);
  if constexpr (!Axis::kIsPart && !Plan::kKeyMask) {
    // A causal axis may show fewer than kernel_size keys
    Range all[Plan::kRank];
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      all[r] = {window[r].begin, window[r].begin + problem.axes[r].kernel_size};
    for_each_line<false>(problem, item, all, [&](const Line<Plan::kRank>& line) {
      int visible = window[kLast].end - window[kLast].begin;
#pragma unroll
      for (int r = 0; r < kLast; ++r)
        if (line.offset[r] >= window[r].end - window[r].begin) visible = 0;
      const Element* first = arguments.key.at(item.batch, line.first, kv_head);
      multiply([=](int i) { return first + i * key_stride; }, [=](int i) { return i < visible; },
               line.count, bias_of<Plan, false>(problem, arguments.rpb, item.head, line));
    });
  } else {
    for_each_slot_line(problem, item, window, [&](const Line<Plan::kRank>& line, auto key_index) {
      const auto token_of = [&](int i, int (&token)[Plan::kRank]) {
#pragma unroll
        for (int r = 0; r < kLast; ++r) token[r] = line.first[r];
        token[kLast] = problem.axes[kLast].token({line.first[kLast], key_index(i)});
      };
      const auto key = [&](int i) {
        int token[Plan::kRank];
        token_of(i, token);
        return arguments.key.at(item.batch, token, kv_head);
      };
      const auto seen = [&](int i) {
        if (key_index(i) < 0) return false;
        int token[Plan::kRank];
        token_of(i, token);
        return !arguments.hides(item.batch, token);
      };
      multiply(key, seen, line.count,
               bias_of<Plan, false>(problem, arguments.rpb, item.head, line));
    });
  }

  // The additional keys
  const Element* additional = arguments.additional_keys.at(item.batch, kv_head);
  const long long additional_stride = arguments.additional_keys.token[0];
  const int count = problem.additional;
  multiply([=](int i) { return additional + i * additional_stride; },
           [=](int i) { return i < count; }, count, [](int) { return Number(0); });
}

}  // namespace cuneigh::naive
