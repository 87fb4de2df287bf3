// The units that dQ of a query is counted in, for sums in fixed point (hopper/sums.cuh).
//
// With P = exp(S - lse), whose sum over the keys of a query is 1, and dS = P * (dO V^T - delta), an
// element of dQ = dS K is at most
//
//   (sum|dO| max|V| + |delta|) max|K|
//
// and so is the sum of the magnitudes of its terms, so that they may be added in any order. The
// maxima are those of the keys and values that queries of its cell may see (hopper/prepare.cu). A
// unit is the power of two of which between 2^29 and 2^30 are that bound: another bit is for the
// rounding of P, of the difference and of dS, and one for the sign. (The rounding of P is larger
// than a bit only where logits are so large, some millions, that no digit of a weight is right.)
#pragma once

#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"

namespace cuneigh::sums {

template <int kRank>
struct UnitArguments {
  View<float, kRank> units;  // [batch, x1..xr, heads]: units in 1.0; NaN if dQ is not finite
  const float2* magnitudes;  // [batch, key heads, cells]: the largest of keys and of values
  long long shift[kRank];    // cells are 2^shift tokens long, along each axis
};

// The largest magnitudes of keys and values that a query may see.
template <int kRank>
__device__ float2 magnitudes_of(const Problem<kRank>& problem,
                                const UnitArguments<kRank>& arguments, const Item<kRank>& item) {
  unsigned place =
      item.batch * (problem.heads / problem.group_size) + item.head / problem.group_size;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int shift = arguments.shift[r];
    place = place * (((problem.axes[r].length - 1) >> shift) + 1) + (item.token[r] >> shift);
  }
  return arguments.magnitudes[place];
}

// The units in 1.0, a power of two: `sum` is sum|dO| / 256, which is finite if dO is.
__device__ inline float units_of(float sum, float delta, float2 magnitudes) {
  constexpr float kLargest = 3.402823466e38f;
  const float bound = (sum * magnitudes.y + fabsf(delta) / 256) * magnitudes.x;
  // NaN for what is not finite, and not for a finite product that is too large
  const float none = sum * 0 + delta * 0 + magnitudes.x * 0;
  const int exponent = int(__float_as_uint(fminf(bound, kLargest)) >> 23) - 127 + 8;
  return __uint_as_float(clamp(29 - exponent + 127, 1, 253) << 23) + none;
}

}  // namespace cuneigh::sums
