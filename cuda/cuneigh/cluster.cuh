// The blocks of a cluster, which write to each other's shared memory; from sm_90 on.
#pragma once

// Makes the blocks of a kernel clusters of `size`, where that is compiled with CUNEIGH_CLUSTERS.
#ifdef CUNEIGH_CLUSTERS
#define CUNEIGH_CLUSTER(size) __cluster_dims__(size, 1, 1)
#else
#define CUNEIGH_CLUSTER(size)
#endif

namespace cuneigh {

// Says that this thread has come here, and waits until all threads of the cluster that still run
// have said so: the memory of their blocks is there then, and what they wait for has been read.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// What all threads of the cluster have written to shared memory before it, all can read after it.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// Writes to another block where `here` lies in this one.
__device__ inline void put(int block, const float4* here, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 address;\n\tmapa.shared::cluster.u32 address, %0, %1;\n\t"
      "st.shared::cluster.v4.f32 [address], {%2, %3, %4, %5};\n\t}" ::"r"(
          unsigned(__cvta_generic_to_shared(here))),
      "r"(block), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
#endif
}
__device__ inline void put(int block, const float2* here, float2 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n\t.reg .u32 address;\n\tmapa.shared::cluster.u32 address, %0, %1;\n\t"
      "st.shared::cluster.v2.f32 [address], {%2, %3};\n\t}" ::"r"(
          unsigned(__cvta_generic_to_shared(here))),
      "r"(block), "f"(value.x), "f"(value.y)
      : "memory");
#endif
}

}  // namespace cuneigh
