// The running softmax of rows of logits.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh {

// Tensor core kernels have weights 2^(logit - shift), whose shift follows a row's maximum only when
// that has moved by more than this, which is seldom; no float16 is near overflow.
constexpr float kSlack = 8;
constexpr float kLargest = 3.402823466e38f;

template <typename Number>
struct Softmax {  // of one row
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

// The lse to subtract from a logit; that of a row without any finite logit makes all weights 0.
template <typename Number>
__device__ Number finite_shift(Number lse) {
  return lse == -infinity<Number>() ? infinity<Number>() : lse;
}

}  // namespace cuneigh
