// The softmax of rows of logits S that come some keys at a time: m = max(S), P = exp(S - m),
// O = P V / sum(P), lse = m + log(sum(P)).
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh {

// One row, in the precision of its sums. A row that has seen no finite logit has the weights 0.
template <typename Number>
struct Softmax {
  Number row_max = -infinity<Number>();  // m
  Number row_sum = 0;                    // sum(P)

  // Row maximum: the larger one of m and max(S).
  template <int kKeys>
  __device__ Number max_with(const Number (&logit)[kKeys]) const {
    Number larger = row_max;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) larger = logit[i] > larger ? logit[i] : larger;
    return larger;
  }

  // Rescale: m becomes `larger`. Returns exp(m - larger), by which O must be multiplied as well.
  __device__ Number rescale(Number larger) {
    const Number factor = exponential(row_max - finite(larger));
    row_sum *= factor;
    row_max = larger;
    return factor;
  }

  // Weights: S becomes P = exp(S - m), and is added to the sum.
  template <int kKeys>
  __device__ void exponentiate(Number (&logit)[kKeys]) {
    const Number subtracted = finite(row_max);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      logit[i] = exponential(logit[i] - subtracted);
      row_sum += logit[i];
    }
  }

  // All three. Returns the factor by which O must be multiplied before P V is added to it.
  template <int kKeys>
  __device__ Number update(Number (&logit)[kKeys]) {
    const Number factor = rescale(max_with(logit));
    exponentiate(logit);
    return factor;
  }

  // Finalize: O is multiplied by `numerator` / sum(P).
  __device__ Number normalizer(Number numerator = 1) const {
    return row_sum == 0 ? Number(0) : numerator / row_sum;
  }
  __device__ Number lse() const {
    return row_sum == 0 ? -infinity<Number>() : row_max + logarithm(row_sum);
  }

  // While all logits are -inf, 0 is subtracted from them: -inf - -inf is NaN.
  __device__ static Number finite(Number max) {
    return max == -infinity<Number>() ? Number(0) : max;
  }
};

// The lse to subtract from a logit: that of a row without a finite logit makes all weights 0.
template <typename Number>
__device__ Number finite_lse(Number lse) {
  return lse == -infinity<Number>() ? infinity<Number>() : lse;
}

}  // namespace cuneigh
