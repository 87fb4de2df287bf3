// What warps of different roles, and blocks, wait for.
#pragma once

#include "cuneigh/barrier.cuh"

namespace cuneigh::hopper {

// Counters in global memory by which blocks wait for others: what a thread has written before it
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
