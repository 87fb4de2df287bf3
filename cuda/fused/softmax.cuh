// The running softmax of a warp's rows, as in FlashAttention-2, with logits in base 2.
#pragma once

#include "cuneigh/softmax.cuh"
#include "fused/mma.cuh"

namespace cuneigh::fused {

constexpr float kLn2 = 0.693147181f;
constexpr float kLog2E = 1.44269504f;

// The maximum and the sum over the four lanes that share a row.
__device__ inline float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Of each lane's two rows in every sixteen. (In the other order of these two members the compiler
// schedules one kernel differently.)
template <int kRowTiles>
struct RunningSoftmax {
  float row_sum[kRowTiles][2] = {};  // of weights, over this lane's columns alone
  // Weights are 2^(logit - row_max). `row_max` follows the maximum of the logits only when that has
  // grown by more than kSlack, which is seldom, so that it may be a little less than the maximum.
  float row_max[kRowTiles][2];

  __device__ RunningSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -kLargest;
  }

  // Step 1, row maximum and rescale: raises `row_max` where a tile of logits S, times `factor`,
  // exceeds it too far, and brings what was summed before to the new scale:
  //   row_sum *= 2^(old row_max - row_max),  O *= 2^(old row_max - row_max)
  template <int kColumnTiles, int kDimTiles>
  __device__ void rescale(const float (&logit)[kRowTiles][kColumnTiles][4], float factor,
                          float (&output)[kRowTiles][kDimTiles][4]) {
    float tile_max[kRowTiles][2];  // over this lane's columns
    bool grows = false;
    // The rows go side by side: one chain of maxima alone would be slow
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pair = fmaxf(logit[m][n][2 * half], logit[m][n][2 * half + 1]);
          tile_max[m][half] = n == 0 ? pair : fmaxf(tile_max[m][half], pair);
        }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tile_max[m][half] *= factor;
        grows |= tile_max[m][half] > row_max[m][half] + kSlack;
      }
    if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float new_max = max_of_row(tile_max[m][half]);
          if (!(new_max > row_max[m][half] + kSlack)) new_max = row_max[m][half];
          const float decay = ex2_approx(row_max[m][half] - new_max);
          row_max[m][half] = new_max;
          row_sum[m][half] *= decay;
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) {
            output[m][d][2 * half] *= decay;
            output[m][d][2 * half + 1] *= decay;
          }
        }
    }
  }

  // Step 2: P = 2^(factor * S - row_max) in the place of S, and row_sum += sum(P).
  template <int kColumnTiles>
  __device__ void weights(float (&logit)[kRowTiles][kColumnTiles][4], float factor) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = logit[m][n][i];
          weight = ex2_approx(fmaf(weight, factor, -row_max[m][i / 2]));
          row_sum[m][i / 2] += weight;
        }
  }

  // Step 3, finalize: what the sums of one of a lane's rows are to be multiplied by, and its lse.
  // `total` is the sum of its weights over all columns.
  __device__ float total(int m, int half) const { return sum_of_row(row_sum[m][half]); }
  __device__ static float normalizer(float total) { return total == 0 ? 0.0f : rcp_approx(total); }
  __device__ float lse(int m, int half, float total) const {
    return total == 0 ? -infinity<float>() : row_max[m][half] * kLn2 + logf(total);
  }
};

}  // namespace cuneigh::fused
