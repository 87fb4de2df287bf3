// The gradient of the relative positional bias: a block takes one entry of one head and a share of
// the (batch, query) pairs, and sums the gradient of the logit of the key at that relative place,
// wherever the query sees it. The shares are added up by naive_sum.
//
// blockIdx.x: (head, entry of rpb, share).

#include "cuneigh/layout.cuh"
#include "cuneigh/naive.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct BackwardRpbArguments {
  ConstView<Plan> query, key, value;
  BiasView<Plan> rpb;
  ConstView<Plan> grad_output;
  ConstNumberView<Plan> lse, delta;
  ConstView<Plan> grad_logits;  // given if Plan::kStored; all of the above are then null
  NumberView<Plan> shares;      // [shares, heads, entries], contiguous
};

// Plan::kStored: the gradient of the logits is read, not recomputed.
template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    rpb(const Problem<Plan::kRank> problem, const BackwardRpbArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kRank = Plan::kRank;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;

  // This block's head, entry and share
  unsigned entries = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) entries *= 2 * problem.axes[r].kernel_size - 1;
  const unsigned shares = gridDim.x / (problem.heads * entries);
  const unsigned share = blockIdx.x % shares;
  const unsigned head_and_entry = blockIdx.x / shares;
  const int head = head_and_entry / entries;
  const int kv_head = head / problem.group_size;
  int relative[kRank], shift[kRank];
  unsigned rest = head_and_entry % entries;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int extent = 2 * problem.axes[r].kernel_size - 1;
    relative[r] = rest % extent;
    shift[r] = relative[r] - (problem.axes[r].kernel_size - 1);
    rest /= extent;
  }

  Number sum = 0;
  for (int batch = 0; batch < problem.batch; ++batch) {
    for_each_token(
        problem, share * kGroups + Lanes::member(), shares * kGroups,
        [&](const int (&token)[kRank]) {
          // The key at this relative place, if the query sees it
          int key_token[kRank], offset[kRank];
#pragma unroll
          for (int r = 0; r < kRank; ++r) {
            const Axis& axis = problem.axes[r];
            const int index = token[r] / axis.dilation, group = token[r] % axis.dilation;
            const Range window = axis.window(index, group);
            const int key_index = index + shift[r];
            if (key_index < window.begin || key_index >= window.end) return;
            key_token[r] = axis.token({group, key_index});
            offset[r] = key_index - window.begin;
          }

          if constexpr (Plan::kStored) {
            const long long slot = slot_of(problem, offset) * arguments.grad_logits.inner;
            sum += convert<Number>(arguments.grad_logits.at(batch, token, head)[slot]);
          } else {
            const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(batch, token, head),
                                                        problem.head_dim);
            const Held<ValueRow<Plan>, Plan::kWide> grad_output(
                arguments.grad_output.at(batch, token, head), problem.value_dim);
            const Number product =
                Lanes::sum(query.dot(arguments.key.at(batch, key_token, kv_head)));
            const Number grad_weight =
                Lanes::sum(grad_output.dot(arguments.value.at(batch, key_token, kv_head)));
            const Number logit = Number(problem.scale) * product +
                                 convert<Number>(*arguments.rpb.at(0, relative, head));
            const Number shift = finite_shift(*arguments.lse.at(batch, token, head));
            sum += exponential(logit - shift) *
                   (grad_weight - *arguments.delta.at(batch, token, head));
          }
        });
  }

  sum = block_sum<Plan::kThreads, Plan::kLanes>(sum);
  if (threadIdx.x == 0)
    arguments.shares.data[(unsigned long long)share * problem.heads * entries + head_and_entry] =
        sum;
}

}  // namespace cuneigh::sums
