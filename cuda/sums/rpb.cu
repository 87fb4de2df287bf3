// The gradient of the relative positional bias (rpb): a block takes one element of one head and a
// share of the queries, and sums dS of the key at that relative position, wherever the query sees
// it. `sums/shares` adds up the shares.
//
// blockIdx.x: head, element of rpb and share.

#include "cuneigh/layout.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct RpbArguments : KeyMask<Plan> {
  ConstView<Plan> query, key;        // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> value;             // [batch, x1..xr, kv_heads, value_dim]
  BiasView<Plan> rpb;                // [heads, 2 K - 1, ..]
  ConstView<Plan> grad_output;       // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, delta;  // [batch, x1..xr, heads]
  // [batch, x1..xr, heads, slots]; given if Plan::kStored, and all of the above are null then
  ConstView<Plan> grad_logits;
  NumberView<Plan> shares;  // [shares, heads, elements], contiguous
};

// Plan::kStored: whether dS is in memory. Else it is recomputed.
template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    rpb(const Problem<Plan::kRank> problem, const RpbArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kRank = Plan::kRank;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;

  // This block's head, element and share
  unsigned elements = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) elements *= 2 * problem.axes[r].kernel_size - 1;
  const unsigned shares = gridDim.x / (problem.heads * elements);
  const unsigned share = blockIdx.x % shares;
  const unsigned head_and_element = blockIdx.x / shares;
  const int head = head_and_element / elements;
  const int kv_head = head / problem.group_size;
  int element[kRank], relative[kRank];  // key less query is `relative`
  unsigned rest = head_and_element % elements;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int extent = 2 * problem.axes[r].kernel_size - 1;
    element[r] = rest % extent;
    relative[r] = element[r] - (problem.axes[r].kernel_size - 1);
    rest /= extent;
  }

  Number sum = 0;
  for (int batch = 0; batch < problem.batch; ++batch) {
    for_each_token(
        problem, share * kGroups + Lanes::index(), shares * kGroups,
        [&](const int (&token)[kRank]) {
          // The key at this relative position, if the query sees it
          int key_token[kRank], offset[kRank];
#pragma unroll
          for (int r = 0; r < kRank; ++r) {
            const Axis& axis = problem.axes[r];
            const int index = token[r] / axis.dilation, group = token[r] % axis.dilation;
            const Range window = axis.window(index, group);
            const int key_index = index + relative[r] - axis.shift(group);
            if (key_index < window.begin || key_index >= window.end) return;
            const int key_group = axis.key_group(group), turned = axis.turned(key_index);
            if (Axis::kIsPart && turned >= axis.key_group_length(key_group)) return;
            key_token[r] = axis.token({key_group, turned});
            offset[r] = key_index - window.begin;
            if (Axis::kIsPart) offset[r] = key_index - axis.unclipped(index, group).begin;
          }
          if (arguments.hides(batch, key_token)) return;

          if constexpr (Plan::kStored) {
            const long long slot = slot_of(problem, offset) * arguments.grad_logits.inner;
            sum += convert<Number>(arguments.grad_logits.at(batch, token, head)[slot]);
          } else {
            const Held<KeyRow<Plan>, Plan::kWide> query(arguments.query.at(batch, token, head),
                                                        problem.head_dim);
            const Held<ValueRow<Plan>, Plan::kWide> grad_output(
                arguments.grad_output.at(batch, token, head), problem.value_dim);
            // S = scale Q K^T + bias, dP = dO V^T
            const Number product =
                Lanes::sum(query.dot(arguments.key.at(batch, key_token, kv_head)));
            const Number grad_weight =
                Lanes::sum(grad_output.dot(arguments.value.at(batch, key_token, kv_head)));
            const Number logit = Number(problem.scale) * product +
                                 convert<Number>(*arguments.rpb.at(0, element, head));
            // P = exp(S - lse), dS = P (dP - delta)
            const Number lse = finite_lse(*arguments.lse.at(batch, token, head));
            sum +=
                exponential(logit - lse) * (grad_weight - *arguments.delta.at(batch, token, head));
          }
        });
  }

  sum = block_sum<Plan::kThreads, Plan::kLanes>(sum);
  if (threadIdx.x == 0)
    arguments.shares.data[(unsigned long long)share * problem.heads * elements + head_and_element] =
        sum;
}

}  // namespace cuneigh::sums
