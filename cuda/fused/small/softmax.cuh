// The running softmax of a warp's sixteen rows, with the steps of cuneigh/warp_softmax.cuh. Where
// kOneStage there is only one tile, so that no maximum ever has to rise.
#pragma once

#include "cuneigh/warp_softmax.cuh"
#include "fused/small/smem.cuh"

namespace cuneigh::fused::small {

// Of a lane's two rows.
template <typename Plan>
struct TileSoftmax {
  // Two sums of weights for each row. For lse they must be exact, and are over this lane's columns
  // alone. Otherwise tensor cores sum the rounded weights, which are what the output is made of.
  float row_sum[4] = {};
  float row_max[2] = {-kLargest, -kLargest};  // m

  // Row maximum and rescale: S becomes -inf outside of windows. Then m rises to the maximum of S
  // times `scale`. Where there are several stages it rises only if it is exceeded too far, and then
  // the sum and O are multiplied by 2^(old m - new m).
  template <int kColumnTiles, int kDimTiles>
  __device__ void rescale(float (&logit)[kColumnTiles][4], LaneMasks<Plan> visible, float scale,
                          float (&output)[kDimTiles][4]) {
    float tile_max[2];  // over this lane's columns
    bool grows = Plan::kOneStage;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile_max[half] = -infinity<float>();
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = logit[n][2 * half + i];
          if (!(visible.row[half] >> (n * 2 + i) & 1)) x = -infinity<float>();
          tile_max[half] = fmaxf(tile_max[half], x);
        }
      tile_max[half] *= scale;
      grows |= tile_max[half] > row_max[half] + kRescaleThreshold;
    }
    if (Plan::kOneStage || __any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_max = max_of_row(tile_max[half]);
        if (!Plan::kOneStage && !(new_max > row_max[half] + kRescaleThreshold))
          new_max = row_max[half];
        new_max = fmaxf(new_max, -kLargest);
        const float factor = ex2_approx(row_max[half] - new_max);
        row_max[half] = new_max;
        if (Plan::kOneStage) continue;
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          row_sum[i] *= factor;
#pragma unroll
          for (int d = 0; d < kDimTiles; ++d) output[d][i] *= factor;
        }
      }
    }
  }

  // Weights: P = 2^(S * scale - m) of sixteen columns, as a left operand, is added to the sum.
  __device__ void exponentiate(const float (*logit)[4], float scale, unsigned (&weight)[4]) {
    using Element = typename Plan::Element;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &logit[i / 2][i % 2 * 2];
      const float low = ex2_approx(fmaf(pair[0], scale, -row_max[i % 2]));
      const float high = ex2_approx(fmaf(pair[1], scale, -row_max[i % 2]));
      if (Plan::kLse) row_sum[i % 2 * 2] += low + high;
      weight[i] = pack(low, high, Element());
    }
    if (!Plan::kLse)  // P times ones
      mma_m16n8k16(row_sum, weight, ones(Element()), ones(Element()), Element());
  }

  // Finalize, given the sum of a row over all of its columns: O is multiplied by 1 / sum(P).
  __device__ float sum(int half) const {
    return Plan::kLse ? sum_of_row(row_sum[2 * half]) : row_sum[2 * half];
  }
  __device__ static float normalizer(float sum) { return sum == 0 ? 0.0f : rcp_approx(sum); }
  __device__ float lse(int half, float sum) const {
    return (row_max[half] + lg2_approx(sum)) * kLn2;
  }
  __device__ void reset() {
    row_max[0] = row_max[1] = -kLargest;
#pragma unroll
    for (int i = 0; i < 4; ++i) row_sum[i] = 0;
  }
};

}  // namespace cuneigh::fused::small
