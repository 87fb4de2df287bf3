// Boxes of tokens from global to shared memory by the tensor memory accelerator (TMA).
#pragma once

#include "hopper/barrier.cuh"

namespace cuneigh::hopper {

// What cuTensorMapEncodeTiled writes: five axes, the innermost one contiguous. (cuda.h, which
// declares the type, does not compile under NVRTC.)
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

constexpr int kLineElements = 64;  // of 2 bytes: a line of 128 bytes, the widest that TMA swizzles
constexpr int kLineBytes = 128;

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

// Copies what lies at `source` to where `target` lies in another block of the cluster; there `full`
// counts the bytes.
template <typename What>
__device__ void copy_to_block(int block, What* target, const What* source, Barrier& full) {
  asm volatile(
      "{ .reg .u32 target, full; mapa.shared::cluster.u32 target, %0, %1; "
      "mapa.shared::cluster.u32 full, %2, %1; "
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[target], [%3], %4, [full]; }" ::"r"(shared_address(target)),
      "r"(block), "r"(shared_address(&full)), "r"(shared_address(source)), "n"(sizeof(What))
      : "memory");
}

// Writes `bytes` of shared memory to global memory, or adds them to the float32 that lie there.
// Several of these make a group, which the thread that issued them commits and awaits.
__device__ inline void store_bulk(float* target, unsigned source, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
               "r"(source), "r"(bytes)
               : "memory");
}
__device__ inline void add_bulk(float* target, unsigned source, unsigned bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
      "r"(source), "r"(bytes)
      : "memory");
}
__device__ inline void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until shared memory has been read, and may be written anew.
__device__ inline void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Waits until global memory has been written.
__device__ inline void wait_until_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders what this thread reads and writes by itself, and what TMA and wgmma do: in shared memory,
// or in global memory.
__device__ inline void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace cuneigh::hopper
