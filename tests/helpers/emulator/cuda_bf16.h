// What the kernels need of CUDA's header of this name, for the host compiler.
#pragma once
#include <cstring>

#include "cuda_fp16.h"
struct __nv_bfloat16 {
  unsigned short x;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    if (f != f) {
      x = 0x7fff;
      return;
    }
    u += 0x7fff + (u >> 16 & 1);
    x = u >> 16;
  }
  operator float() const {
    unsigned u = unsigned(x) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 h) { return float(h); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
