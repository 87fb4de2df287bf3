// mbarriers in shared memory, on which threads wait for each other and for TMA.
//
// A barrier completes a phase when as many threads have arrived, and as many bytes have been
// written by TMA, as it expects. Phases alternate in parity; a wait names the parity of the phase.
#pragma once

#include "cuneigh/smem.cuh"

namespace cuneigh {

// Lanes that arrive for a warp. One is enough, but racecheck of compute-sanitizer does not see that
// __syncwarp puts what the other lanes did before its arrival: for it, all of them arrive.
#ifdef CUNEIGH_ALL_LANES_ARRIVE
constexpr unsigned kArrivingLanes = 32;
#else
constexpr unsigned kArrivingLanes = 1;
#endif

// Whether this lane is the one that the warp elects. All lanes must ask.
__device__ inline bool is_elected() {
  unsigned elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
               : "=r"(elected));
  return elected;
}

struct Barrier {
  unsigned long long state;

  // Of a phase: arrivals of single threads, and of whole warps.
  __device__ void init(unsigned threads, unsigned warps = 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)),
                 "r"(threads + warps * kArrivingLanes)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // For others as well, `count` in all.
  __device__ void arrive(unsigned count) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(count)
                 : "memory");
  }
  // The arrival of a warp, after all that its lanes have done. All of them must call it.
  __device__ void arrive_as_warp() {
    __syncwarp();
    if (kArrivingLanes == 32 || is_elected()) arrive();
  }
  // One arrival, after which the phase also waits for `bytes` from TMA.
  __device__ void arrive_and_expect(unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ bool completed(unsigned parity) const {
    unsigned done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return done;
  }
  __device__ void wait(unsigned parity) const {
    while (!completed(parity)) {
    }
  }
};

// Makes initialized barriers known to TMA; a __syncthreads then makes them known to the block.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace cuneigh
