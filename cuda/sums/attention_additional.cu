// The gradients of the additional keys and values: a block takes one of them and a share of the
// queries, all of which see it, recomputes their weights from lse, and sums dK = scale dS^T Q and
// dV = P^T dO. `sums/shares` adds up the shares.
//
// blockIdx.x: share, batch, additional key and key head; blockIdx.y: a slice of both head
// dimensions.

#include "cuneigh/layout.cuh"
#include "cuneigh/reduce.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"
#include "sums/shares.cuh"

namespace cuneigh::sums {

template <typename Plan>
struct AttentionAdditionalArguments {
  ConstView<Plan> query;                               // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> additional_keys, additional_values;  // [batch, n, kv_heads, dim]
  ConstView<Plan> grad_output;                         // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, delta;                    // [batch, x1..xr, heads]
  NumberView<Plan> key_shares, value_shares;  // [shares, batch, n, kv_heads, dim], contiguous
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    attention_additional(const Problem<Plan::kRank> problem,
                         const AttentionAdditionalArguments<Plan> arguments) {
  using Number = Accumulator<typename Plan::Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr unsigned kGroups = Plan::kThreads / Plan::kLanes;

  const Share share = share_of(problem);
  const int key_slice = blockIdx.y * KeyRow<Plan>::kCapacity;
  const int value_slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const Number scale = Number(problem.scale);

  const Held<KeyRow<Plan>, Plan::kWide> key(
      arguments.additional_keys.at(share.batch, share.kv_head) +
          share.key * arguments.additional_keys.token[0],
      problem.head_dim);  // [head_dim]
  const Held<ValueRow<Plan>, Plan::kWide> value(
      arguments.additional_values.at(share.batch, share.kv_head) +
          share.key * arguments.additional_values.token[0],
      problem.value_dim);     // [value_dim]
  KeyRow<Plan> grad_key;      // a slice of it
  ValueRow<Plan> grad_value;  // a slice of it

  for (int in_group = 0; in_group < problem.group_size; ++in_group) {
    const int head = share.kv_head * problem.group_size + in_group;
    const unsigned first = share.index * kGroups + Lanes::index();
    for_each_token(problem, first, share.count * kGroups, [&](const int (&token)[Plan::kRank]) {
      const auto* query = arguments.query.at(share.batch, token, head);
      const auto* grad_output = arguments.grad_output.at(share.batch, token, head);
      KeyRow<Plan> query_row;
      ValueRow<Plan> grad_row;
      query_row.load(query, problem.head_dim);
      grad_row.load(grad_output, problem.value_dim);
      // S = scale Q K^T, P = exp(S - lse), dP = dO V^T
      const Number logit = scale * Lanes::sum(key.dot(query_row, query));
      const Number lse = finite_lse(*arguments.lse.at(share.batch, token, head));
      const Number weight = exponential(logit - lse);
      const Number grad_weight = Lanes::sum(value.dot(grad_row, grad_output));
      if (Plan::kWide) {
        query_row.load(query + key_slice, problem.head_dim - key_slice);
        grad_row.load(grad_output + value_slice, problem.value_dim - value_slice);
      }
      // dS = P (dP - delta), dK += dS^T Q, dV += P^T dO
      const Number delta = *arguments.delta.at(share.batch, token, head);
      grad_key.add(weight * (grad_weight - delta), query_row);
      grad_value.add(weight, grad_row);
    });
  }

  grad_key.scale(scale);
  store_block_sum<Plan::kThreads>(
      grad_key, arguments.key_shares.data + share.row * problem.head_dim + key_slice,
      problem.head_dim - key_slice);
  store_block_sum<Plan::kThreads>(
      grad_value, arguments.value_shares.data + share.row * problem.value_dim + value_slice,
      problem.value_dim - value_slice);
}

}  // namespace cuneigh::sums
