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
#include "sums/rpb.cuh"

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

  const BiasElement<kRank> element(problem);
  const int head = element.head;

  Number sum = 0;
  for (int batch = 0; batch < problem.batch; ++batch) {
    for_each_token(
        problem, element.share * kGroups + Lanes::index(), element.shares * kGroups,
        [&](const int (&token)[kRank]) {
          int key_token[kRank], offset[kRank];
          if (!element.find_key(problem, token, key_token, offset)) return;
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
                Lanes::sum(query.dot(arguments.key.at(batch, key_token, element.kv_head)));
            const Number grad_weight =
                Lanes::sum(grad_output.dot(arguments.value.at(batch, key_token, element.kv_head)));
            const Number logit = Number(problem.scale) * product +
                                 convert<Number>(*arguments.rpb.at(0, element.index, head));
            // P = exp(S - lse), dS = P (dP - delta)
            const Number lse = finite_lse(*arguments.lse.at(batch, token, head));
            sum +=
                exponential(logit - lse) * (grad_weight - *arguments.delta.at(batch, token, head));
          }
        });
  }

  sum = block_sum<Plan::kThreads, Plan::kLanes>(sum);
  if (threadIdx.x == 0) arguments.shares.data[element.place(problem)] = sum;
}

}  // namespace cuneigh::sums
