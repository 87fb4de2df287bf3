// Boxes of tokens: where they begin, and what the rows of a box can see. (cuneigh/_gpu/passes.py
// says what rows and columns are.)
#pragma once

#include "cuneigh/window.cuh"

namespace cuneigh {

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Along an axis of `length` tokens, each of whose dilation groups is cut into boxes of `size`: the
// first token of box number `box`.
__device__ inline GroupIndex box_begin(int dilation, int length, int box, int size) {
  if (dilation == 1) return {0, box * size};
  const int shorter = length / dilation;
  const int longer_groups = length % dilation;
  const int per_longer = ceil_div(shorter + 1, size), per_shorter = ceil_div(shorter, size);
  const int in_longer = longer_groups * per_longer;
  if (box < in_longer) return {box / per_longer, box % per_longer * size};
  box -= in_longer;
  return {longer_groups + box / per_shorter, box % per_shorter * size};
}

// The windows of several rows along one axis.
struct WindowUnion {
  Range any;  // columns that at least one of the rows sees
  Range all;  // columns that all of the rows see

  __device__ static WindowUnion of_none() { return {{1 << 30, 0}, {0, 1 << 30}}; }
  __device__ void add(Range window) {
    any = {smaller(any.begin, window.begin), larger(any.end, window.end)};
    all = {larger(all.begin, window.begin), smaller(all.end, window.end)};
  }
  __device__ void add(const WindowUnion& other) {
    any = {smaller(any.begin, other.any.begin), larger(any.end, other.any.end)};
    all = {larger(all.begin, other.all.begin), smaller(all.end, other.all.end)};
  }
  // Over all lanes of a warp.
  __device__ WindowUnion of_warp() const {
    WindowUnion windows = *this;
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
      windows.add({{__shfl_xor_sync(0xffffffffu, windows.any.begin, step),
                    __shfl_xor_sync(0xffffffffu, windows.any.end, step)},
                   {__shfl_xor_sync(0xffffffffu, windows.all.begin, step),
                    __shfl_xor_sync(0xffffffffu, windows.all.end, step)}});
    return windows;
  }
  // Whether none or all of the pairs with the columns [begin, end) are visible.
  __device__ bool misses(int begin, int end) const { return begin >= any.end || end <= any.begin; }
  __device__ bool covers(int begin, int end) const { return all.begin <= begin && end <= all.end; }
};

}  // namespace cuneigh
