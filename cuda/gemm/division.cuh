// Coordinates in boxes whose extents are known at run time alone, by cheap divisions.
#pragma once

namespace cuneigh::gemm {

template <int kRank>
__device__ int volume(const int (&extent)[kRank]) {
  int product = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) product *= extent[r];
  return product;
}

// Division by a number that many numbers are divided by.
struct Divisor {
  unsigned value, inverse;

  Divisor() = default;
  __device__ explicit Divisor(unsigned value)
      : value(value), inverse(value > 1 ? 0xffffffffu / value + 1 : 0) {}

  // Turns `n`, which is less than 2^31, into the quotient and returns the remainder.
  __device__ int divide(unsigned& n) const {
    if (value == 1) return 0;
    unsigned quotient = __umulhi(n, inverse);  // or one too many
    int rest = n - quotient * value;
    if (rest < 0) {
      --quotient;
      rest += value;
    }
    n = quotient;
    return rest;
  }
};

// The extents of a box, ready for many divisions.
template <int kRank>
struct Extents {
  Divisor inner[kRank > 1 ? kRank - 1 : 1];  // of all axes but the first

  __device__ explicit Extents(const int (&size)[kRank]) {
#pragma unroll
    for (int r = 1; r < kRank; ++r) inner[r - 1] = Divisor(size[r]);
  }
  __device__ int size(int r) const { return int(inner[r - 1].value); }
};

// Coordinates in a box of the given extents: those of its element number `number` in raster order.
template <int kRank>
struct Coordinates {
  int at[kRank];

  __device__ Coordinates(unsigned number, const Extents<kRank>& extents) {
#pragma unroll
    for (int r = kRank - 1; r > 0; --r) at[r] = extents.inner[r - 1].divide(number);
    at[0] = number;
  }
  // Moves on to the next element in raster order.
  __device__ void advance(const Extents<kRank>& extents) {
    ++at[kRank - 1];
#pragma unroll
    for (int r = kRank - 1; r > 0; --r)
      if (at[r] == extents.size(r)) {
        at[r] = 0;
        ++at[r - 1];
      }
  }
};

}  // namespace cuneigh::gemm
