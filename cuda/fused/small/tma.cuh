// Boxes of vectors from global to shared memory by the tensor memory accelerator (TMA) of sm_90.
#pragma once

#include "fused/mma.cuh"

namespace cuneigh::fused::small {

// What cuTensorMapEncodeTiled writes: five axes, the innermost one contiguous.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// An mbarrier in shared memory. It completes a phase when as many threads have arrived as it
// expects, and TMA has written as many bytes as they have announced. Phases alternate in parity.
struct Barrier {
  unsigned long long state;

  __device__ void init(int threads) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(threads)
                 : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void arrive_and_expect(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ void wait(unsigned parity) const {
    unsigned done;
    do {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    } while (!done);
  }
};

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

}  // namespace cuneigh::fused::small
