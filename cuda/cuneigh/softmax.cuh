// The running softmax of one row of logits.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh {

template <typename Number>
struct Softmax {
  Number maximum = -infinity<Number>();
  Number sum = 0;  // of exp(logit - maximum)

  // Turns a batch of logits into weights relative to the new maximum. Returns the factor that
  // brings what was accumulated with earlier weights to the same scale.
  template <int kBatch>
  __device__ Number update(Number (&logit)[kBatch]) {
    Number next = maximum;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) next = logit[i] > next ? logit[i] : next;
    // While every logit is -inf any finite shift will do: all weights are 0.
    const Number shift = next == -infinity<Number>() ? Number(0) : next;
    const Number factor = exponential(maximum - shift);
    sum *= factor;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      logit[i] = exponential(logit[i] - shift);
      sum += logit[i];
    }
    maximum = next;
    return factor;
  }

  // Log of the sum of exp of all logits; -inf for a row without any finite one.
  __device__ Number lse() const {
    return sum == 0 ? -infinity<Number>() : maximum + logarithm(sum);
  }
  __device__ Number normalizer() const { return sum == 0 ? Number(0) : 1 / sum; }
};

}  // namespace cuneigh
