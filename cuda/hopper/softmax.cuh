// The running softmax of the two queries that a thread shares with the three other lanes of a quad.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh::hopper {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Weights are 2^(scale * logit - row_max). row_max follows a row's maximum only when that has moved
// by more than this, which is seldom; no float16 is near overflow.
constexpr float kRescaleThreshold = 8;
constexpr float kLargest = 3.402823466e38f;

// Accumulators 4 i and 4 i + 1 belong to the first query, 4 i + 2 and 4 i + 3 to the second.
struct RunningSoftmax {
  float negative_max[2] = {kLargest, kLargest};  // - row_max; finite also while nothing is visible
  float sum[2] = {0, 0};                         // of this lane's weights

  // Takes the maxima of new logits into account. If it returns true, what was accumulated with
  // earlier weights must be multiplied by `factor`.
  template <int kCount>
  __device__ bool raise(const float (&logit)[kCount], float scale, float (&factor)[2]) {
    float tile_max[2] = {logit[0], logit[2]};
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      tile_max[0] = fmaxf(tile_max[0], fmaxf(logit[4 * i], logit[4 * i + 1]));
      tile_max[1] = fmaxf(tile_max[1], fmaxf(logit[4 * i + 2], logit[4 * i + 3]));
    }
    const float rise = fmaxf(fmaf(tile_max[0], scale, negative_max[0]),
                             fmaf(tile_max[1], scale, negative_max[1]));
    if (!__any_sync(0xffffffffu, rise > kRescaleThreshold)) return false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = negative_max[half], top = quad_max(tile_max[half]) * scale;
      // A row follows its own maximum alone: its bits do not depend on its neighbors
      if (top + old > kRescaleThreshold) negative_max[half] = -top;
      factor[half] = exp2_approx(negative_max[half] - old);
      sum[half] *= factor[half];
    }
    return true;
  }

  // Turns the logits of the columns 8 kFrom to 8 kTo into weights.
  template <int kFrom, int kTo, int kCount>
  __device__ void weigh(float (&logit)[kCount], float scale) {
#pragma unroll
    for (int i = 4 * kFrom; i < 4 * kTo; ++i) {
      const int half = i / 2 % 2;
      logit[i] = exp2_approx(fmaf(logit[i], scale, negative_max[half]));
      sum[half] += logit[i];
    }
  }

  // Adds up the sums of the quad. Afterwards `normalizer` and `lse` may be asked for.
  __device__ void finalize() {
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }
  // What accumulated values are multiplied by; 0 for a row without any finite logit.
  __device__ float normalizer(int half) const {
    return sum[half] == 0 ? 0.f : __fdividef(1.f, sum[half]);
  }
  // Natural log of the sum of exp of all logits; -inf for a row without any finite one.
  __device__ float lse(int half) const {
    constexpr float kLn2 = 0.69314718f;
    return sum[half] == 0 ? -infinity<float>() : kLn2 * (log2f(sum[half]) - negative_max[half]);
  }
};

template <int kCount>
__device__ void rescale(float (&sum)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] *= factor[i / 2 % 2];
}

}  // namespace cuneigh::hopper
