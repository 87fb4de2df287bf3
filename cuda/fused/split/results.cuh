// What becomes of sums over parts of the keys of a row. problem.cuh says what sums are.
#pragma once

#include "cuneigh/warp_softmax.cuh"
#include "cuneigh/window.cuh"
#include "fused/mma.cuh"

namespace cuneigh::fused::split {

struct Row {
  int token;  // -1 where there is no row
  int head;
  Range window;  // empty where there is no row
};

// Four dimensions of a row, whose sums over several parts are joined in a fixed order: first all
// statistics are seen, then all sums are added.
struct Joined {
  float4 output = {0, 0, 0, 0};
  float row_max = -kLargest;
  float row_sum = 0;

  __device__ void see(float2 statistics) { row_max = fmaxf(row_max, statistics.x); }
  __device__ void add(float2 statistics, float4 part) {
    const float factor = ex2_approx(statistics.x - row_max);
    row_sum += factor * statistics.y;
    output.x += factor * part.x, output.y += factor * part.y;
    output.z += factor * part.z, output.w += factor * part.w;
  }

  template <typename Element>
  __device__ void store(Element* target) const {
    const float normalizer = WarpSoftmax<1>::normalizer(row_sum);
    store_pair(target, output.x * normalizer, output.y * normalizer);
    store_pair(target + 2, output.z * normalizer, output.w * normalizer);
  }
  __device__ float lse() const {
    return row_sum == 0 ? -infinity<float>() : row_max * kLn2 + logf(row_sum);
  }
};

}  // namespace cuneigh::fused::split
