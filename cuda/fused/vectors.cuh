// How vectors lie in shared memory: the same chunk of 16 bytes of eight vectors that follow each
// other lies in different banks, so that ldmatrix reads all eight at once.
#pragma once

#include "fused/mma.cuh"

namespace cuneigh::fused {

// Elements of a chunk of 16 bytes. Head dimensions are padded to an even number of chunks.
template <typename Element>
constexpr int kChunk = 16 / sizeof(Element);

// There are two layouts. Vectors of half elements that fill whole lines of 128 bytes are swizzled:
// chunk i of a line lies where chunk i ^ (vector % 8) would. All other vectors have an unused chunk
// between them. That makes copies slower: what 32 lanes write then goes across lines, in 10
// wavefronts instead of 4.
template <typename Element, int kDim>
constexpr bool kSwizzled = sizeof(Element) == 2 && kDim % 64 == 0;

// Elements from one vector to the next.
template <typename Element, int kDim>
constexpr int kVectorPitch = kSwizzled<Element, kDim> ? kDim : kDim + kChunk<Element>;

// Where a vector has an element. The pitch tells which layout it is: vectors with a chunk between
// them never have a pitch of whole lines.
template <typename Element, int kPitch>
__device__ Element* element_of(Element (*vectors_smem)[kPitch], int vector, int dim) {
  if constexpr (kSwizzled<Element, kPitch>) dim ^= vector % 8 * kChunk<Element>;
  return &vectors_smem[vector][dim];
}

// The address of element `d` + `dim` of vector `first` + `vector`, where `first` is a multiple of
// 8, and `d` a multiple of all that `dim` may be. Constants `first` and `d` take few registers.
template <typename Element, int kPitch>
__device__ unsigned address_of(const Element (*vectors_smem)[kPitch], int first, int vector, int d,
                               int dim) {
  constexpr int kBytes = sizeof(Element), kLine = 128 / kBytes;
  const unsigned address = shared_address(element_of(vectors_smem, vector, dim));
  if constexpr (kSwizzled<Element, kPitch>)
    return (address ^ d % kLine * kBytes) + (first * kPitch + d / kLine * kLine) * kBytes;
  return address + (first * kPitch + d) * kBytes;
}

}  // namespace cuneigh::fused
