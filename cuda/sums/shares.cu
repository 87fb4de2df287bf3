// Adds up the shares of a gradient that several blocks computed, in a fixed order.
//
// One thread for each element. Plan: kThreads, Number (dtype of the shares), Result (of the
// gradient).

#include "cuneigh/types.cuh"

namespace cuneigh::sums {

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads)
    shares(const typename Plan::Number* shares,  // [count, size]
           long long count, long long size,
           typename Plan::Result* result) {  // [size]
  const long long i = blockIdx.x * (long long)Plan::kThreads + threadIdx.x;
  if (i >= size) return;
  typename Plan::Number sum = 0;
  for (long long s = 0; s < count; ++s) sum += shares[s * size + i];
  result[i] = convert<typename Plan::Result>(sum);
}

}  // namespace cuneigh::sums
