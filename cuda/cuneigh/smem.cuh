// Shared memory as instructions address it.
#pragma once

namespace cuneigh {

// The 32-bit shared memory address that PTX takes.
__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace cuneigh
