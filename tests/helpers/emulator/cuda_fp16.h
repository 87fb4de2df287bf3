// What the kernels need of CUDA's header of this name, for the host compiler.
#pragma once
#include <cstring>
struct __half {
  unsigned short x;
  __half() = default;
  explicit __half(float f) {
    _Float16 h = (_Float16)f;
    memcpy(&x, &h, 2);
  }
  operator float() const {
    _Float16 h;
    memcpy(&h, &x, 2);
    return (float)h;
  }
};
struct __half2 {
  __half x, y;
};
inline float __half2float(__half h) { return float(h); }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float a, float b) { return {a, b}; }
struct alignas(16) int4 {
  int x, y, z, w;
};
inline int4 make_int4(int a, int b, int c, int d) { return {a, b, c, d}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
