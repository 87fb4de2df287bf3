// What consumers do where rows are keys and columns are queries: weights and gradients of logits,
// transposed, and what the kernels for dK and dV alone have in common, dkv.cu and dkv_long.cu.
#pragma once

#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct DkvArguments : HiddenKeys<Plan> {
  OfQueries<Plan> queries;
  View<typename Plan::Element, Plan::kRank> grad_key, grad_value;
  unsigned* taken;  // 0 before the launch; see `begin_tiles`
};

// For each of this thread's two keys, `store(half, token, head, exists, is_hidden)`: `is_hidden`
// says whether the mask hides it, so that its gradients are zeros, whatever their sums are.
template <typename Plan, typename Store>
__device__ void for_each_key(const HopperProblem<Plan::kRank>& problem, const Consumer<Plan>& me,
                             const DkvArguments<Plan>& arguments, Store store) {
  const Tile<Plan::kRank>& tile = me.tile();
  const int head = tile.head + problem.warpgroup[me.w][0];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int token[Plan::kRank];
    const bool exists = token_of_row<Plan>(problem, tile, me.w, me.row() + 8 * half, token);
    store(half, token, head, exists, exists && arguments.hides(tile.batch, token));
  }
}

// An array of arrays as one of all their elements.
template <typename T, int kOuter, int kInner>
__device__ auto flat(T (&array)[kOuter][kInner]) -> T (&)[kOuter * kInner] {
  return reinterpret_cast<T(&)[kOuter * kInner]>(array);
}

// Reads numbers of the columns that a thread holds, two of each tile of 8. To be called early:
// while products read shared memory, it takes hundreds of cycles.
template <int kNumbers>
__device__ void read(const float* from, float (&numbers)[kNumbers]) {
#pragma unroll
  for (int i = 0; i < kNumbers; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    numbers[i] = four.x, numbers[i + 1] = four.y;
    numbers[i + 2] = four.z, numbers[i + 3] = four.w;
  }
}

// P^T = 2^(scale S^T - lse), in place of S^T [64, 8 kTiles].
template <int kTiles>
__device__ void exponentiate(float (&logit)[kTiles][4], float scale,
                             const float (&lse)[2 * kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      logit[n][i] = ex2_approx(fmaf(logit[n][i], scale, -lse[2 * n + i % 2]));
}

// dS^T = P^T * (dP^T - delta) [64, 16 kSteps], as a left operand. P^T is the rounded one that dV is
// made of. In bfloat16 the difference is rounded as well, and multiplied in pairs: that halves the
// instructions, of which there are many, and makes root mean square errors of sums of dS some 1.2
// times as large. In float16 a difference may be too large for that.
template <typename Element, int kSteps>
__device__ void multiply_by_weights(const float (&grad_weight)[2 * kSteps][4],
                                    const unsigned (&weight)[kSteps][4],
                                    const float (&delta)[4 * kSteps],
                                    unsigned (&grad_logit)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = 2 * step + i / 2, half = i % 2;
      const float low = grad_weight[n][2 * half] - delta[2 * n];
      const float high = grad_weight[n][2 * half + 1] - delta[2 * n + 1];
      if constexpr (kSame<Element, bfloat16>) {
        grad_logit[step][i] =
            multiply_pairs(weight[step][i], pack(low, high, Element()), Element());
      } else {
        const float2 pair = unpack(weight[step][i], Element());
        grad_logit[step][i] = pack(pair.x * low, pair.y * high, Element());
      }
    }
}

}  // namespace cuneigh::hopper
