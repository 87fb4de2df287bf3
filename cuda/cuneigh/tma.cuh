// Boxes of tokens from global to shared memory by the tensor memory accelerator (TMA).
#pragma once

#include "cuneigh/barrier.cuh"

namespace cuneigh {

// What cuTensorMapEncodeTiled writes: five axes, the innermost one contiguous. (cuda.h, which
// declares the type, does not compile under NVRTC.)
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// Has a map fetched that TMA will need soon.
__device__ inline void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads the box at the coordinates `c` into shared memory at `target`; `full` counts its bytes.
// Coordinates may lie outside of the array, where zeros are read.
__device__ inline void load_box(unsigned target, const TensorMap& map, Barrier& full,
                                const int (&c)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(target),
      "l"(&map), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]), "r"(shared_address(&full))
      : "memory");
}

// Orders what this thread reads and writes by itself in shared memory, and what TMA and wgmma do.
__device__ inline void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace cuneigh
