// Which keys are hidden from all queries.
#pragma once

#include "cuneigh/layout.cuh"

namespace cuneigh {

// The key mask, if the kernel takes one: true where a key may be seen. A kernel's arguments begin
// with it.
template <typename Plan, bool kGiven = Plan::kKeyMask>
struct KeyMask {
  View<const bool, Plan::kRank> key_mask;  // [batch, x1..xr]

  __device__ bool hides(int batch, const int (&token)[Plan::kRank]) const {
    return !*key_mask.at(batch, token, 0);
  }
  // Whether a key of a line may be seen, as a function of the key's number in the line.
  __device__ auto seen_in(const Problem<Plan::kRank>& problem, int batch,
                          const int (&first)[Plan::kRank]) const {
    constexpr int kLast = Plan::kRank - 1;
    const bool* mask = key_mask.at(batch, first, 0);
    const long long stride = problem.axes[kLast].dilation * key_mask.token[kLast];
    return [mask, stride](int i) { return mask[i * stride]; };
  }
};
template <typename Plan>
struct KeyMask<Plan, false> {
  __device__ static constexpr bool hides(int, const int (&)[Plan::kRank]) { return false; }
  __device__ static auto seen_in(const Problem<Plan::kRank>&, int, const int (&)[Plan::kRank]) {
    return [](int) { return true; };
  }
};

}  // namespace cuneigh
