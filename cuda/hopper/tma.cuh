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

}  // namespace cuneigh::hopper
