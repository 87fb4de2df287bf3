// How the fused kernels keep vectors in shared memory: eight at the same chunk of 16 bytes lie in
// different banks.
#pragma once

#include "fused/mma.cuh"
#include "fused/row_box.cuh"

namespace cuneigh::fused {

// Half elements that fill whole lines of 128 bytes keep to them, with the chunks of a line in
// another order for each of eight vectors. Other vectors have a chunk between them, which costs
// copies: what they write then goes across lines, in 10 wavefronts for 32 lanes instead of 4.
template <typename Element, int kDim>
constexpr bool kWholeLines = sizeof(Element) == 2 && kDim % 64 == 0;
template <typename Element, int kDim>
constexpr int kVectorPitch = kWholeLines<Element, kDim> ? kDim : kPitchOf<Element, kDim>;

// Where a vector has an element. A pitch tells which of the two ways it is: vectors with a chunk
// between them never have a pitch of whole lines.
template <typename Element, int kPitch>
__device__ Element* place_of(Element (*vectors_smem)[kPitch], int vector, int dim) {
  if constexpr (kWholeLines<Element, kPitch>) dim ^= vector % 8 * kChunk<Element>;
  return &vectors_smem[vector][dim];
}

// The address of element `d` + `dim` of vector `first` + `vector`, where `first` is a multiple of
// 8, and `d` a multiple of all that `dim` may be. Constants `first` and `d` take few registers.
template <typename Element, int kPitch>
__device__ unsigned address_of(const Element (*vectors_smem)[kPitch], int first, int vector, int d,
                               int dim) {
  constexpr int kBytes = sizeof(Element), kLine = 128 / kBytes;
  const unsigned address = shared_address(place_of(vectors_smem, vector, dim));
  if constexpr (kWholeLines<Element, kPitch>)
    return (address ^ d % kLine * kBytes) + (first * kPitch + d / kLine * kLine) * kBytes;
  return address + (first * kPitch + d) * kBytes;
}

}  // namespace cuneigh::fused
