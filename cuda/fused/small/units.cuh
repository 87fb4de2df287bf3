// Offsets in global memory of 32 bits, counted in units (fused/small/problem.cuh).
#pragma once

#include "cuneigh/layout.cuh"
#include "fused/small/problem.cuh"

namespace cuneigh::fused::small {

// Elements of a unit.
template <typename Element>
constexpr int kUnit = sizeof(Element) == 2 ? 8 : 1;

// The element that is `units` away: a product of 32 bits and a constant instead of one of 64 bits.
template <typename Element>
__device__ Element* offset_by(Element* pointer, unsigned units) {
  unsigned long long address = reinterpret_cast<unsigned long long>(pointer);
  asm("mad.wide.u32 %0, %1, %2, %0;"
      : "+l"(address)
      : "r"(units), "n"(kUnit<Element> * int(sizeof(Element))));
  pointer = reinterpret_cast<Element*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Units from the token at 0 to another. Strides are positive, and 32 bits hold every offset.
template <typename Element, int kRank>
__device__ unsigned offset_of(const View<Element, kRank>& view, const int (&token)[kRank]) {
  unsigned units = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    units += token[r] * unsigned((unsigned long long)view.token[r] / kUnit<Element>);
  return units;
}

// Where a block finds an array in the first element of the batch, and its strides in units.
template <typename Element>
struct Origin {
  Element* data;
  unsigned batch, head;
  unsigned first_axis;  // to the next token of a dilation group along the first axis
};

// The origin of an array of the rows: the token at 0.
template <typename Element, int kRank>
__device__ Origin<Element> origin_of_rows(const View<Element, kRank>& view, int head) {
  return {view.at(0, head), unsigned(view.batch / kUnit<Element>), 0, 0};
}

// The same token in an element of the batch.
template <typename Element>
__device__ Element* in_batch(const Origin<Element>& origin, int batch) {
  return offset_by(origin.data, batch * origin.batch);
}

}  // namespace cuneigh::fused::small
