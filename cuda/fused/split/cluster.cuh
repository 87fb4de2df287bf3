// The blocks of a cluster, which read each other's shared memory; from sm_90 on.
#pragma once

#include "fused/mma.cuh"

// Makes the blocks of a kernel clusters of `size`, where that is compiled with CUNEIGH_CLUSTERS.
#ifdef CUNEIGH_CLUSTERS
#define CUNEIGH_CLUSTER(size) __cluster_dims__(size, 1, 1)
#else
#define CUNEIGH_CLUSTER(size)
#endif

namespace cuneigh::fused::split {

// What all threads of the cluster have written to shared memory before it, all can read after it.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// What lies in another block where `here` lies in this one.
__device__ inline float4 in_block(int block, const float4* here) {
  float4 there = {};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 address;\n\tmapa.shared::cluster.u32 address, %4, %5;\n\t"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [address];\n\t}"
      : "=f"(there.x), "=f"(there.y), "=f"(there.z), "=f"(there.w)
      : "r"(shared_address(here)), "r"(block));
#endif
  return there;
}
__device__ inline float2 in_block(int block, const float2* here) {
  float2 there = {};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 address;\n\tmapa.shared::cluster.u32 address, %2, %3;\n\t"
      "ld.shared::cluster.v2.f32 {%0, %1}, [address];\n\t}"
      : "=f"(there.x), "=f"(there.y)
      : "r"(shared_address(here)), "r"(block));
#endif
  return there;
}

}  // namespace cuneigh::fused::split
