// How the gradients of attention change where the operands Q, K, V and the gradient dO of the
// output move along tangents, which have a prime here. With P = exp(S - lse) and dP = dO V^T,
//
//   P' = P (S' - lse')        S' = scale (Q' K^T + Q K'^T) + bias'    dP' = dO' V^T + dO V'^T
//   dS = P (dP - delta)       dS' = P' (dP - delta) + P (dP' - delta')
//
// and dQ' = scale (dS' K + dS K'), dK' = scale (dS'^T Q + dS^T Q'), dV' = P'^T dO + P^T dO'. In
// names `d_` stands for the prime.
#pragma once

#include "cuneigh/operands.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh {

// What all kernels of an hvp take. `views` of cuneigh/_gpu/hvp.py packs it.
template <typename Plan>
struct HvpArguments : KeyMask<Plan> {
  Operands<Plan> operands, tangents;
  ConstView<Plan> grad_output, d_grad_output;  // [batch, x1..xr, heads, value_dim]; d_ or null
  ConstNumberView<Plan> lse, d_lse;            // [batch, x1..xr, heads]
  NumberView<Plan> delta, d_delta;             // [batch, x1..xr, heads]
};

// Those numbers of one query.
template <typename Number>
struct HvpQuery {
  Number lse, d_lse, delta, d_delta;

  template <typename Plan, typename Token>
  __device__ static HvpQuery of(const HvpArguments<Plan>& arguments, int batch, const Token& token,
                                int head) {
    return {finite_lse(*arguments.lse.at(batch, token, head)),
            *arguments.d_lse.at(batch, token, head), *arguments.delta.at(batch, token, head),
            *arguments.d_delta.at(batch, token, head)};
  }
};

// P, P', dS and dS' of a query and a key: all 0 where P is 0, whatever they are made of.
template <typename Number>
struct HvpPair {
  Number weight = 0, d_weight = 0, grad_logit = 0, d_grad_logit = 0;

  __device__ HvpPair(const HvpQuery<Number>& query, Number logit, Number d_logit,
                     Number grad_weight, Number d_grad_weight) {
    weight = exponential(logit - query.lse);
    if (weight == 0) return;
    d_weight = weight * (d_logit - query.d_lse);
    grad_logit = weight * (grad_weight - query.delta);
    d_grad_logit =
        d_weight * (grad_weight - query.delta) + weight * (d_grad_weight - query.d_delta);
  }
};

}  // namespace cuneigh
