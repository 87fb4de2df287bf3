// What TMA and bulk copies do beside loading boxes.
#pragma once

#include "cuneigh/tma.cuh"
#include "hopper/barrier.cuh"

namespace cuneigh::hopper {

constexpr int kLineElements = 64;  // of 2 bytes: a line of 128 bytes, the widest that TMA swizzles
constexpr int kLineBytes = 128;

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

// Adds the integers in `bytes` of shared memory to those in global memory. Several of these make a
// group, which the thread that issued them commits and awaits.
__device__ inline void add_bulk(int4* target, unsigned source, unsigned bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(target),
      "r"(source), "r"(bytes)
      : "memory");
}
__device__ inline void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until shared memory has been read of all groups but the last kPending, and may be written
// anew.
template <int kPending>
__device__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until global memory has been written.
__device__ inline void wait_until_written() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// What `fence_shared` does, in global memory.
__device__ inline void fence_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace cuneigh::hopper
