// How the gradient of the relative positional bias (rpb) changes along tangents (cuneigh/hvp.cuh):
// a block takes one element of one head and a share of the queries, and sums dS' of the key at that
// relative position, wherever the query sees it. `sums/shares` adds up the shares.
//
// blockIdx.x: head, element of rpb and share.

#include "cuneigh/hvp.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"
#include "sums/rpb.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct HvpRpbArguments : HvpArguments<Plan> {
  NumberView<Plan> shares;  // [shares, heads, elements], contiguous
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    hvp_rpb(const Problem<Plan::kRank> problem, const HvpRpbArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  using HeldKey = Held<KeyRow<Plan>, Plan::kWide, true>;
  using HeldValue = Held<ValueRow<Plan>, Plan::kWide, true>;
  constexpr int kRank = Plan::kRank;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;

  const BiasElement<kRank> element(problem);
  const int head = element.head;
  const Number scale = Number(problem.scale);
  const Number bias = convert<Number>(*operands.rpb.at(0, element.index, head));
  const Number d_bias = convert<Number>(*tangents.rpb.at(0, element.index, head));

  Number sum = 0;
  for (int batch = 0; batch < problem.batch; ++batch) {
    for_each_token(
        problem, element.share * kGroups + Lanes::index(), element.shares * kGroups,
        [&](const int (&token)[kRank]) {
          int key_token[kRank], offset[kRank];
          if (!element.find_key(problem, token, key_token, offset)) return;
          if (arguments.hides(batch, key_token)) return;
          auto of_query = [&](const auto& view) { return view.at(batch, token, head); };
          auto of_key = [&](const auto& view) {
            return view.at(batch, key_token, element.kv_head);
          };

          const HeldKey query(of_query(operands.query), problem.head_dim);
          const HeldKey key(of_key(operands.key), problem.head_dim);
          const Number product = Lanes::sum(query.dot(key.row, key.data));
          const Number d_product =
              Lanes::sum(query.dot(of_key(tangents.key)) + key.dot(of_query(tangents.query)));
          const HeldValue grad_output(of_query(arguments.grad_output), problem.value_dim);
          const HeldValue value(of_key(operands.value), problem.value_dim);
          const Number grad_weight = Lanes::sum(grad_output.dot(value.row, value.data));
          Number d_grad_weight = grad_output.dot(of_key(tangents.value));
          if (arguments.d_grad_output.data)
            d_grad_weight += value.dot(of_query(arguments.d_grad_output));
          d_grad_weight = Lanes::sum(d_grad_weight);

          const auto numbers = HvpQuery<Number>::of(arguments, batch, token, head);
          sum += HvpPair<Number>(numbers, scale * product + bias, scale * d_product + d_bias,
                                 grad_weight, d_grad_weight)
                     .d_grad_logit;
        });
  }

  sum = block_sum<Plan::kThreads, Plan::kLanes>(sum);
  if (threadIdx.x == 0) arguments.shares.data[element.place(problem)] = sum;
}

}  // namespace cuneigh::sums
