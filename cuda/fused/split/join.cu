// The output and lse of all rows out of their sums over the splits. problem.cuh defines the words.
//
// A warp takes a row, and a lane four dimensions of every 128.
//
// blockIdx.x: (element of the batch, query, head).
//
// struct Plan {
//   static constexpr int kSplits;  most splits: a multiple of 32
//   using Element;                 float16 or bfloat16
// };

#include "cuneigh/boxes.cuh"
#include "fused/split/problem.cuh"
#include "fused/split/results.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::split {

template <typename Plan>
struct JoinArguments {
  Sums sums;
  typename Plan::Element* output;  // [batch, queries, heads, value_dim]
  float* lse;                      // [batch, queries, heads], or null
  long long rows;
  long long splits;
  long long value_dim;
};

template <typename Plan>
__global__ void __launch_bounds__(32) join(const JoinArguments<Plan> arguments) {
  constexpr int kEach = Plan::kSplits / 32;
  const auto [sums, output, lse, rows, splits, value_dim] = arguments;
  const long long row = blockIdx.x;
  const int lane = thread_in_block();

  // Every lane has the statistics of some splits
  float2 statistics_rmem[kEach];
  float row_max = -kLargest;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int split = i * 32 + lane;
    statistics_rmem[i] = {-kLargest, 0};
    if (split < splits) statistics_rmem[i] = sums.statistics[split * rows + row];
    row_max = fmaxf(row_max, statistics_rmem[i].x);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    row_max = fmaxf(row_max, __shfl_xor_sync(0xffffffffu, row_max, step));

  for (int d = lane * 4; d < ceil_div(int(value_dim), 128) * 128; d += 128) {
    Joined joined;
    joined.row_max = row_max;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int count = smaller(int(splits) - i * 32, 32);
#pragma unroll 8
      for (int j = 0; j < count; ++j) {
        const float2 statistics = {__shfl_sync(0xffffffffu, statistics_rmem[i].x, j),
                                   __shfl_sync(0xffffffffu, statistics_rmem[i].y, j)};
        float4 part = {0, 0, 0, 0};
        if (d < value_dim)
          part = *reinterpret_cast<const float4*>(sums.output +
                                                  ((i * 32 + j) * rows + row) * value_dim + d);
        joined.add(statistics, part);
      }
    }
    if (d < value_dim) joined.store(output + row * value_dim + d);
    if (d == 0 && lse) lse[row] = joined.lse();
  }
}

}  // namespace cuneigh::fused::split
