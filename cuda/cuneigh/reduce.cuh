// Sums over the groups of a block, in an order that is the same in every run.
#pragma once

#include "cuneigh/row.cuh"

namespace cuneigh {

// The sum of `x` over the groups of the block, valid in thread 0. Every thread must call it.
template <int kThreads, int kLanes, typename Number>
__device__ Number block_sum(Number x) {
  __shared__ Number sum_smem[kThreads / kLanes];  // [groups]
  if (Group<kLanes>::lane() == 0) sum_smem[Group<kLanes>::index()] = x;
  __syncthreads();
  for (int half = kThreads / kLanes / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sum_smem[threadIdx.x] += sum_smem[threadIdx.x + half];
    __syncthreads();
  }
  return sum_smem[0];
}

// Writes the first `size` elements of the sum of the rows of all groups of the block to `sum`.
// Every thread must call it.
template <int kThreads, typename Element, int kVector, int kLanes, int kChunks, bool kExact>
__device__ void store_block_sum(const Row<Element, kVector, kLanes, kChunks, kExact>& row,
                                Accumulator<Element>* sum, int size) {
  __shared__ Accumulator<Element> row_smem[kThreads];  // [groups, kLanes]
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      row_smem[threadIdx.x] = row.value[c][i];
      __syncthreads();
      // Thread t and thread t + kLanes hold the same dimension for neighboring groups.
      for (int half = kThreads / 2; half >= kLanes; half /= 2) {
        if (threadIdx.x < half) row_smem[threadIdx.x] += row_smem[threadIdx.x + half];
        __syncthreads();
      }
      const int dimension = (c * kLanes + threadIdx.x) * kVector + i;
      if (threadIdx.x < kLanes && dimension < size) sum[dimension] = row_smem[threadIdx.x];
      __syncthreads();
    }
  }
}

}  // namespace cuneigh
