// What a thread knows about itself, and how long the compiler keeps that in registers.
#pragma once

namespace cuneigh::fused {

// This thread's number in its block, in a register of its own. The compiler takes threadIdx.x for
// cheap and reads it again wherever it is used, but each read takes dozens of cycles.
__device__ inline int thread_in_block() { return __shfl_xor_sync(0xffffffffu, threadIdx.x, 0); }

// The same number, which the compiler takes for a new one: what a loop computes from it is then
// computed again in every round instead of being kept in registers.
__device__ inline int forgotten(int thread) {
  asm volatile("" : "+r"(thread));
  __builtin_assume(thread >= 0);
  return thread;
}

// A parameter, in a register. The compiler would read it again before each use, which takes dozens
// of cycles where the use is behind a predicate.
__device__ inline float in_register(float parameter) {
  return __shfl_sync(0xffffffffu, threadIdx.x % 32 == 0 ? parameter : 0.0f, 0);
}

// A block's dynamic shared memory, whose address is kept in a register for the same reason. It
// begins at a multiple of 128 bytes (vectors.cuh).
template <typename Smem>
__device__ Smem& dynamic_smem() {
  extern __shared__ __align__(128) char memory_smem[];
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(memory_smem));
  address = __shfl_xor_sync(0xffffffffu, address, 0);
  return *reinterpret_cast<Smem*>(__cvta_shared_to_generic(address));
}

}  // namespace cuneigh::fused
