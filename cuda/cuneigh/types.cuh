// Element types under the names of their NumPy dtypes, and the precision that sums are taken in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace cuneigh {

using float16 = __half;
using bfloat16 = __nv_bfloat16;
using float32 = float;
using float64 = double;

// float64 for float64 elements, else float32.
template <typename Element>
struct AccumulatorOf {
  using Type = float32;
};
template <>
struct AccumulatorOf<float64> {
  using Type = float64;
};
template <typename Element>
using Accumulator = typename AccumulatorOf<Element>::Type;

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;

template <typename To, typename From>
__device__ To convert(From x) {
  return static_cast<To>(x);
}
template <>
__device__ inline float32 convert(float16 x) {
  return __half2float(x);
}
template <>
__device__ inline float32 convert(bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ inline float16 convert(float32 x) {
  return __float2half_rn(x);
}
template <>
__device__ inline bfloat16 convert(float32 x) {
  return __float2bfloat16_rn(x);
}

template <typename Number>
__device__ Number infinity() {
  if constexpr (sizeof(Number) == 8)
    return __longlong_as_double(0x7ff0000000000000);
  else
    return __int_as_float(0x7f800000);
}

__device__ inline float32 exponential(float32 x) { return __expf(x); }
__device__ inline float64 exponential(float64 x) { return exp(x); }
__device__ inline float32 logarithm(float32 x) { return logf(x); }
__device__ inline float64 logarithm(float64 x) { return log(x); }

constexpr float kLog2E = 1.44269504f;  // log2(e)
constexpr float kLn2 = 0.693147181f;   // ln(2)

// The special function unit's 2^x, 1 / x and log2(x). Subnormal numbers count as 0.
__device__ inline float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cuneigh
