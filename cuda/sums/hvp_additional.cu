// How the gradients of the additional keys and values change along tangents (cuneigh/hvp.cuh): a
// block takes one of them and a share of the queries, all of which see it, and sums
// dK' = scale (dS'^T Q + dS^T Q') and dV' = P'^T dO + P^T dO'. `sums/shares` adds up the shares.
//
// blockIdx.x: share, batch, additional key and key head; blockIdx.y: a slice of both head
// dimensions.

#include "cuneigh/hvp.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"
#include "sums/shares.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct HvpAdditionalArguments : HvpArguments<Plan> {
  NumberView<Plan> key_shares, value_shares;  // [shares, batch, n, kv_heads, dim], contiguous
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    hvp_additional(const Problem<Plan::kRank> problem,
                   const HvpAdditionalArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  using HeldKey = Held<KeyRow<Plan>, Plan::kWide, true>;
  using HeldValue = Held<ValueRow<Plan>, Plan::kWide, true>;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;

  const Share share = share_of(problem);
  const int key_slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int value_slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const Number scale = Number(problem.scale);
  const bool moves = arguments.d_grad_output.data;  // or dO' is 0
  auto of_key = [&](const auto& view) {
    return view.at(share.batch, share.kv_head) + share.key * view.token[0];
  };

  const HeldKey key(of_key(operands.additional_keys), problem.head_dim);
  const HeldKey d_key(of_key(tangents.additional_keys), problem.head_dim);
  const HeldValue value(of_key(operands.additional_values), problem.value_dim);
  const HeldValue d_value(of_key(tangents.additional_values), problem.value_dim);
  KeyRow<Plan> d_grad_key;      // a slice of it
  ValueRow<Plan> d_grad_value;  // a slice of it

  for (int in_group = 0; in_group < problem.group_size; ++in_group) {
    const int head = share.kv_head * problem.group_size + in_group;
    const unsigned first = share.index * kGroups + Lanes::index();
    for_each_token(problem, first, share.count * kGroups, [&](const int (&token)[Plan::kRank]) {
      auto of_query = [&](const auto& view) { return view.at(share.batch, token, head); };
      const auto *query = of_query(operands.query), *d_query = of_query(tangents.query);
      KeyRow<Plan> query_row, d_query_row;
      query_row.load(query, problem.head_dim);
      d_query_row.load(d_query, problem.head_dim);
      const Number product = Lanes::sum(key.dot(query_row, query));
      const Number d_product =
          Lanes::sum(key.dot(d_query_row, d_query) + d_key.dot(query_row, query));
      const auto* grad_output = of_query(arguments.grad_output);
      const auto* d_grad_output = moves ? of_query(arguments.d_grad_output) : nullptr;
      ValueRow<Plan> grad_row, d_grad_row;
      grad_row.load(grad_output, problem.value_dim);
      if (moves) d_grad_row.load(d_grad_output, problem.value_dim);
      const Number grad_weight = Lanes::sum(value.dot(grad_row, grad_output));
      Number d_grad_weight = d_value.dot(grad_row, grad_output);
      if (moves) d_grad_weight += value.dot(d_grad_row, d_grad_output);
      d_grad_weight = Lanes::sum(d_grad_weight);

      const auto numbers = HvpQuery<Number>::of(arguments, share.batch, token, head);
      const HvpPair<Number> pair(numbers, scale * product, scale * d_product, grad_weight,
                                 d_grad_weight);
      if (Plan::kWide) {
        query_row.load(query + key_slice, problem.head_dim - key_slice);
        d_query_row.load(d_query + key_slice, problem.head_dim - key_slice);
        grad_row.load(grad_output + value_slice, problem.value_dim - value_slice);
        if (moves) d_grad_row.load(d_grad_output + value_slice, problem.value_dim - value_slice);
      }
      d_grad_key.add(pair.d_grad_logit, query_row);
      d_grad_key.add(pair.grad_logit, d_query_row);
      d_grad_value.add(pair.d_weight, grad_row);
      if (moves) d_grad_value.add(pair.weight, d_grad_row);
    });
  }

  d_grad_key.scale(scale);
  store_block_sum<Plan::kThreads>(
      d_grad_key, arguments.key_shares.data + share.row * problem.head_dim + key_slice,
      problem.head_dim - key_slice);
  store_block_sum<Plan::kThreads>(
      d_grad_value, arguments.value_shares.data + share.row * problem.value_dim + value_slice,
      problem.value_dim - value_slice);
}

}  // namespace cuneigh::sums
