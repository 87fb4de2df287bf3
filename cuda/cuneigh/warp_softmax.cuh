// The running softmax of a warp's rows on tensor cores, as in FlashAttention-2, in base 2: for the
// maximum m of a row, P = 2^(S * scale - m), O = P V / sum(P), lse = ln(2) * (m + log2(sum(P))).
//
// S is [kRowTiles * 16, kColumnTiles * 8] and lies in registers as products of tensor cores do:
// lane l has the rows l / 4 and l / 4 + 8 of every 16, in the columns 2 * (l % 4) and the one after
// of every 8.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh {

// m follows a row's maximum only when that has grown by more than kRescaleThreshold, which is
// seldom. P stays below 2^kRescaleThreshold, so that no sum of float16 products overflows.
constexpr float kRescaleThreshold = 8;
constexpr float kLargest = 3.402823466e38f;

// The maximum and the sum over the four lanes that share a row.
__device__ inline float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Multiplies one of a lane's two rows of sixteen.
template <int kDimTiles>
__device__ void multiply_row(float (&row)[kDimTiles][4], int half, float factor) {
#pragma unroll
  for (int d = 0; d < kDimTiles; ++d) {
    row[d][2 * half] *= factor;
    row[d][2 * half + 1] *= factor;
  }
}

// Of each lane's two rows in every sixteen. The rows go side by side: one row alone would be a slow
// chain of instructions. (Arrays, and `row_sum` first, because the compiler schedules the kernels
// of `fused` worse with an array of structs or in the other order.)
template <int kRowTiles>
struct WarpSoftmax {
  float row_sum[kRowTiles][2] = {};  // sum(P) of this lane's columns
  float row_max[kRowTiles][2];       // m; finite, since -inf - -inf is NaN

  __device__ WarpSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -kLargest;
  }

  // Row maximum and rescale: m rises where a tile of S exceeds it too far; without kMayLag, where a
  // tile of S exceeds it. There the sum, O and others like it are multiplied by 2^(old m - new m).
  template <bool kMayLag = true, int kColumnTiles, int... kDimTiles>
  __device__ void rescale(const float (&logit)[kRowTiles][kColumnTiles][4], float scale,
                          float (&... outputs)[kRowTiles][kDimTiles][4]) {
    constexpr float kThreshold = kMayLag ? kRescaleThreshold : 0;
    float tile_max[kRowTiles][2];  // over this lane's columns
    bool grows = false;
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
        tile_max[m][half] *= scale;
        grows |= tile_max[m][half] > row_max[m][half] + kThreshold;
      }
    if (__any_sync(0xffffffffu, grows)) raise<kMayLag>(tile_max, outputs...);
  }

  // The same, where a row's maximum asks for it: `tile_max` is that of this lane's columns, times
  // scale.
  template <bool kMayLag = true, int... kDimTiles>
  __device__ void raise(const float (&tile_max)[kRowTiles][2],
                        float (&... outputs)[kRowTiles][kDimTiles][4]) {
    constexpr float kThreshold = kMayLag ? kRescaleThreshold : 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_max = max_of_row(tile_max[m][half]);
        if (!(new_max > row_max[m][half] + kThreshold)) new_max = row_max[m][half];
        const float factor = ex2_approx(row_max[m][half] - new_max);
        row_max[m][half] = new_max;
        row_sum[m][half] *= factor;
        (multiply_row(outputs[m], half, factor), ...);
      }
  }

  // Weights: S becomes P, and is added to the sum; all of it, or the columns [8 begin, 8 end).
  template <int kColumnTiles>
  __device__ void exponentiate(float (&logit)[kRowTiles][kColumnTiles][4], float scale,
                               int begin = 0, int end = kColumnTiles) {
#pragma unroll
    for (int n = begin; n < end; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = logit[m][n][i];
          weight = ex2_approx(fmaf(weight, scale, -row_max[m][i / 2]));
          row_sum[m][i / 2] += weight;
        }
  }

  // Finalize, given the sum of a row over all of its columns: O is multiplied by 1 / sum(P).
  __device__ float sum(int m, int half) const { return sum_of_row(row_sum[m][half]); }
  __device__ static float normalizer(float sum) { return sum == 0 ? 0.0f : rcp_approx(sum); }
  __device__ float lse(int m, int half, float sum) const {
    return sum == 0 ? -infinity<float>() : row_max[m][half] * kLn2 + logf(sum);
  }
};

}  // namespace cuneigh
