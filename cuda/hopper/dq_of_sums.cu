// dQ from its sums (sums.cuh): rounds them, times the scale. A block takes a box of queries; a
// thread has what a consumer's thread had of the products that were added.
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/results.cuh"
#include "hopper/sums.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct DqOfSumsArguments {
  const float4* sums;  // [boxes of queries][warpgroups][64 columns / 8][128 threads]
  View<typename Plan::Element, 1> grad_query;
};

template <typename Plan>
__global__ void __launch_bounds__(128 * Plan::kWarpgroups)
    dq_of_sums(const HopperProblem<1> problem, const DqOfSumsArguments<Plan> arguments) {
  constexpr int kTiles = kLineElements / 8;
  const int w = threadIdx.x / 128, thread = threadIdx.x % 128;
  // The number of the sum, as `turn_of` counts them, taken apart
  const int begin = blockIdx.x % problem.head_sums * Plan::kColumns;
  const unsigned of_head = blockIdx.x / problem.head_sums;
  const unsigned heads = problem.head_groups.divisor * problem.group_size.divisor;
  const int batch = of_head / heads, head = of_head % heads;

  float sum[kTiles][4];
  const float4* sums =
      arguments.sums +
      (static_cast<unsigned long long>(blockIdx.x) * Plan::kWarpgroups + w) * (kTiles * 128);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float4 four = sums[i * 128 + thread];
    sum[i][0] = four.x, sum[i][1] = four.y, sum[i][2] = four.z, sum[i][3] = four.w;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token[1] = {begin + thread / 32 * 16 + thread % 32 / 4 + 8 * half};
    const int first = w * kLineElements;
    store_row(sum, half, problem.gradient_scale, thread % 4,
              arguments.grad_query.at(batch, token, head) + first, problem.head_dim - first,
              token[0] < problem.axes[0].length);
  }
}

}  // namespace cuneigh::hopper
