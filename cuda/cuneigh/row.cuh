// Head vectors that a group of lanes shares, and their arithmetic.
#pragma once

#include "cuneigh/types.cuh"

namespace cuneigh {

// A group is kLanes neighboring lanes of a warp, a power of two of them, that work on one token.
template <int kLanes>
struct Group {
  __device__ static int lane() { return threadIdx.x % kLanes; }
  __device__ static int index() { return threadIdx.x / kLanes; }  // of the group in the block

  // The sum over the lanes. Groups of a warp may take different branches, so that only a group's
  // own lanes wait for each other.
  template <typename Number>
  __device__ static Number sum(Number x) {
    const unsigned first = threadIdx.x % 32 / kLanes * kLanes;
    const unsigned mask = (0xffffffffu >> (32 - kLanes)) << first;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      x += __shfl_xor_sync(mask, x, distance);
    return x;
  }
};

// kVector neighboring elements, moved by one instruction.
template <typename Element, int kVector>
struct alignas(sizeof(Element) * kVector) Packet {
  Element element[kVector];
};

// Up to kCapacity elements of a head vector in the accumulator's precision: lane l of a group holds
// the packets l, l + kLanes, l + 2 kLanes .. kExact promises vectors of exactly kCapacity elements.
template <typename Element_, int kVector, int kLanes, int kChunks, bool kExact>
struct Row {
  using Element = Element_;
  using Number = Accumulator<Element>;
  static constexpr int kCapacity = kVector * kLanes * kChunks;

  Number value[kChunks][kVector] = {};  // this lane's share of [kCapacity]

  // The first `size` elements from `row` on; zeros stand for what lies past them.
  __device__ void load(const Element* row, int size) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int first = (c * kLanes + Group<kLanes>::lane()) * kVector;
      if (kExact || first < size) {
        const auto packet = *reinterpret_cast<const Packet<Element, kVector>*>(row + first);
#pragma unroll
        for (int i = 0; i < kVector; ++i) value[c][i] = convert<Number>(packet.element[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) value[c][i] = 0;
      }
    }
  }

  // Writes the first `size` elements.
  __device__ void store(Element* row, int size) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int first = (c * kLanes + Group<kLanes>::lane()) * kVector;
      if (kExact || first < size) {
        Packet<Element, kVector> packet;
#pragma unroll
        for (int i = 0; i < kVector; ++i) packet.element[i] = convert<Element>(value[c][i]);
        *reinterpret_cast<Packet<Element, kVector>*>(row + first) = packet;
      }
    }
  }

  // This lane's share of the dot product.
  __device__ Number dot(const Row& other) const {
    Number sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += value[c][i] * other.value[c][i];
    return sum;
  }

  // This lane's share of the sum of magnitudes, times `factor`.
  __device__ Number magnitude(Number factor) const {
    Number sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += factor * fabsf(value[c][i]);
    return sum;
  }

  // This += factor * other.
  __device__ void add(Number factor, const Row& other) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[c][i] += factor * other.value[c][i];
  }

  __device__ void scale(Number factor) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kVector; ++i) value[c][i] *= factor;
  }
};

// The vector of the token that a group works on, kept in registers for its products with the
// vectors of many neighbors. If kWide, it may be longer than a Row, and what a Row does not hold is
// read for each product, one Row at a time if kTight: the kernel has no registers for more.
template <typename Row, bool kWide, bool kTight = false>
struct Held {
  using Element = typename Row::Element;
  using Number = typename Row::Number;

  const Element* data;  // [size]
  int size;
  Row row;  // the first kCapacity elements

  __device__ Held(const Element* data, int size) : data(data), size(size) { row.load(data, size); }

  // This lane's share of the product with the vector at `other`, whose first Row is `first`.
  __device__ Number dot(const Row& first, const Element* other) const {
    Number sum = row.dot(first);
    if constexpr (kWide) {
      auto add = [&](int begin) {
        Row mine, others;
        mine.load(data + begin, size - begin);
        others.load(other + begin, size - begin);
        sum += mine.dot(others);
      };
      if constexpr (kTight) {
#pragma unroll 1
        for (int begin = Row::kCapacity; begin < size; begin += Row::kCapacity) add(begin);
      } else {
        for (int begin = Row::kCapacity; begin < size; begin += Row::kCapacity) add(begin);
      }
    }
    return sum;
  }
  // The same where no one else needs that Row.
  __device__ Number dot(const Element* other) const {
    Row first;
    first.load(other, size);
    return dot(first, other);
  }

  // This lane's share of the sum of magnitudes, times `factor`.
  __device__ Number magnitude(Number factor) const {
    Number sum = row.magnitude(factor);
    if constexpr (kWide) {
      for (int begin = Row::kCapacity; begin < size; begin += Row::kCapacity) {
        Row more;
        more.load(data + begin, size - begin);
        sum += more.magnitude(factor);
      }
    }
    return sum;
  }
};

}  // namespace cuneigh
