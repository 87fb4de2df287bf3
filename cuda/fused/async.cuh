// Copies from global to shared memory that run beside the arithmetic; plain copies before sm_80.
#pragma once

namespace cuneigh::fused {

// Whether copies run beside the arithmetic.
#if __CUDA_ARCH__ >= 800
constexpr bool kAsync = true;
#else
constexpr bool kAsync = false;
#endif

// Copies 16 bytes, in pieces of kBytes since the source may be aligned no better; zeros stand for
// what lies past the first `valid` bytes, a multiple of kBytes.
template <int kBytes>
__device__ inline void copy_16_bytes(void* target_smem, const void* source, int valid) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(target_smem));
  if constexpr (kBytes == 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      static_cast<unsigned short*>(target_smem)[i] =
          2 * i < valid ? static_cast<const unsigned short*>(source)[i] : 0;
  } else {
#pragma unroll
    for (int i = 0; i < 16; i += kBytes) {
#if __CUDA_ARCH__ >= 800
      // A predicate says whether to read: sizes that are not constants take instructions
      const int ignored = i >= valid;
      if constexpr (kBytes == 16)
        asm volatile(
            "{ .reg .pred p; setp.ne.s32 p, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, p; "
            "}" ::"r"(target + i),
            "l"(static_cast<const char*>(source) + i), "r"(ignored)
            : "memory");
      else
        asm volatile(
            "{ .reg .pred p; setp.ne.s32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, p; "
            "}" ::"r"(target + i),
            "l"(static_cast<const char*>(source) + i), "r"(ignored), "n"(kBytes)
            : "memory");
#else
      for (int j = i; j < i + kBytes; j += 4)
        *reinterpret_cast<unsigned*>(static_cast<char*>(target_smem) + j) =
            i < valid ? *reinterpret_cast<const unsigned*>(static_cast<const char*>(source) + j)
                      : 0;
#endif
    }
  }
}

// Copies 16 bytes from an address as well aligned to this address in shared memory.
__device__ inline void copy_16_bytes(unsigned target, const void* source) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
#else
  const uint4 bytes = *static_cast<const uint4*>(source);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(bytes.x), "r"(bytes.y),
               "r"(bytes.z), "r"(bytes.w)
               : "memory");
#endif
}

// Copies 8 bytes, or zeros if not `exists`.
__device__ inline void copy_8_bytes(void* target_smem, const void* source, bool exists) {
#if __CUDA_ARCH__ >= 800
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(target_smem));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source),
               "r"(exists ? 8 : 0)
               : "memory");
#else
  *static_cast<unsigned long long*>(target_smem) =
      exists ? *static_cast<const unsigned long long*>(source) : 0;
#endif
}

// Ends a group of copies.
__device__ inline void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending groups of this thread's copies are still running.
template <int kPending>
__device__ inline void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace cuneigh::fused
