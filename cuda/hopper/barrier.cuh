// mbarriers in shared memory: what warps of different roles wait for.
//
// A barrier completes a phase when as many threads have arrived, and as many bytes have been
// written by TMA, as it expects. Phases alternate in parity; a wait names the parity of the phase.
#pragma once

namespace cuneigh::hopper {

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

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

// Counters in global memory by which blocks wait for each other: what a block has written before it
// adds is seen by those that have loaded the result.
__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ inline void add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Where a ring of kSlots barriers stands: the slot that is next, and the parity of its phase. Both
// follow from one number, which goes twice around.
template <int kSlots>
struct Ring {
  static constexpr bool kPowerOfTwo = (kSlots & (kSlots - 1)) == 0;
  unsigned position = 0;

  __device__ unsigned slot() const {
    if (kPowerOfTwo) return position % kSlots;
    return position < kSlots ? position : position - kSlots;
  }
  __device__ unsigned parity() const {
    return kPowerOfTwo ? position / kSlots % 2 : position >= kSlots;
  }
  __device__ Ring before() const {
    if (kPowerOfTwo) return {position - 1};
    return {position == 0 ? 2 * kSlots - 1 : position - 1};
  }
  __device__ void advance(unsigned slots = 1) {
    position += slots;
    if (!kPowerOfTwo && position >= 2 * kSlots) position -= 2 * kSlots;
  }
};

}  // namespace cuneigh::hopper
