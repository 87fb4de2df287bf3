// What a lane holds of the operands of a small matrix product C += A B, for every type of elements:
//
//   A  left operand   [16, kDepth]
//   B  right operand  [kDepth, 8]
//   C  product        [16, 8]: lane l holds rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the
//                     one after, as float[4] {row 0: 2 columns, row 1: 2 columns}
//
// Half types are held as tensor cores take them. float32 is held as two TF32 numbers each, or,
// before sm_80, as the numbers that a lane's own multiply-adds need.
#pragma once

#include "fused/mma.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused {

// Elements that a small product sums over: two chunks of 16 bytes.
template <typename Element>
constexpr int kDepth = 2 * kChunk<Element>;

template <typename Element>
struct Left {
  unsigned word[4];
  __device__ void set(unsigned a, unsigned b, unsigned c, unsigned d) {
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
  }
};
template <typename Element>
struct Right {
  unsigned word[2];
  __device__ void set(unsigned a, unsigned b) { word[0] = a, word[1] = b; }
};

// A few small products that are summed apart and added to the sum in `finish`; of half types each
// is added to the sum at once.
template <typename Element>
struct Terms {
  static constexpr int kMost = 1;
  __device__ void add(float (&sum)[4], const Left<Element>& left, const Right<Element>& right) {
    mma_m16n8k16(sum, left.word, right.word[0], right.word[1], Element());
  }
  __device__ void finish(float (&)[4]) {}
};

// A = rows[first : first + 16, d : d + kDepth].
template <typename Element, int kPitch>
__device__ void load_left(Left<Element>& left, const Element (*rows_smem)[kPitch], int first, int d,
                          int lane) {
  unsigned word[4];
  ldmatrix_x4(word, address_of(rows_smem, first, lane % 16, d, lane / 16 * kChunk<Element>));
  left.set(word[0], word[1], word[2], word[3]);
}

// A = weights [16, kDepth], which lie in registers as a product does. A product has the layout of
// an operand.
template <typename Element>
__device__ void left_of_weights(Left<Element>& left, const float (*weight)[4], int) {
  left.set(pack(weight[0][0], weight[0][1], Element()), pack(weight[0][2], weight[0][3], Element()),
           pack(weight[1][0], weight[1][1], Element()),
           pack(weight[1][2], weight[1][3], Element()));
}

// B = vectors[first : first + 8, d : d + kDepth]^T, for one or two times eight vectors.
template <typename Element, int kPitch, int kTiles>
__device__ void load_right(Right<Element> (&right)[kTiles], const Element (*vectors_smem)[kPitch],
                           int first, int d, int lane) {
  unsigned word[4];
  const int vector = (kTiles == 1 ? 0 : lane / 16 * 8) + lane % 8;
  ldmatrix_x4(word, address_of(vectors_smem, first, vector, d, lane / 8 % 2 * kChunk<Element>));
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) right[tile].set(word[2 * tile], word[2 * tile + 1]);
}

// B = vectors[first : first + kDepth, d : d + 8], for two times eight dimensions.
template <typename Element, int kPitch>
__device__ void load_right_transposed(Right<Element> (&right)[2],
                                      const Element (*vectors_smem)[kPitch], int first, int d,
                                      int lane) {
  unsigned word[4];
  ldmatrix_x4_trans(word, address_of(vectors_smem, first, lane % 16, d, lane / 16 * 8));
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) right[tile].set(word[2 * tile], word[2 * tile + 1]);
}

#if __CUDA_ARCH__ >= 800

// A float32 as the sum of two TF32 numbers: `big` has its 11 leading bits, and `small` is the rest.
struct Split {
  unsigned big, small;
  __device__ explicit Split(unsigned bits) {
    big = (bits + 0x1000) & 0xffffe000;
    small = __float_as_uint(__uint_as_float(bits) - __uint_as_float(big));
  }
};

template <>
struct Left<float32> {
  unsigned big[4], small[4];
  __device__ void set(unsigned a, unsigned b, unsigned c, unsigned d) {
    const Split split[4] = {Split(a), Split(b), Split(c), Split(d)};
#pragma unroll
    for (int i = 0; i < 4; ++i) big[i] = split[i].big, small[i] = split[i].small;
  }
};
template <>
struct Right<float32> {
  unsigned big[2], small[2];
  __device__ void set(unsigned a, unsigned b) {
    const Split split[2] = {Split(a), Split(b)};
#pragma unroll
    for (int i = 0; i < 2; ++i) big[i] = split[i].big, small[i] = split[i].small;
  }
};

// a b = big big + big small + small big. (The product of the two small parts is below the last
// bit.) Tensor cores truncate their sums, which would show in float32 where there are many terms.
// So they sum only a few terms, and the FMA units add these sums up.
template <>
struct Terms<float32> {
  static constexpr int kMost = 4;
  float few[4] = {};
  __device__ void add(float (&)[4], const Left<float32>& left, const Right<float32>& right) {
    mma_m16n8k8(few, left.small, right.big);
    mma_m16n8k8(few, left.big, right.small);
    mma_m16n8k8(few, left.big, right.big);
  }
  __device__ void finish(float (&sum)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += few[i];
  }
};

// A lane holds other columns of a TF32 operand than of a product. What is summed over may come in
// any order, so the even columns come first, and `load_right_transposed` takes the same order.
__device__ inline void left_of_weights(Left<float32>& left, const float (*weight)[4], int) {
  left.set(__float_as_uint(weight[0][0]), __float_as_uint(weight[0][2]),
           __float_as_uint(weight[0][1]), __float_as_uint(weight[0][3]));
}
template <int kPitch>
__device__ void load_right_transposed(Right<float32> (&right)[2],
                                      const float32 (*vectors_smem)[kPitch], int first, int d,
                                      int lane) {
  const int even = first + lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int dim = d + tile * 8 + lane / 4;
    right[tile].set(__float_as_uint(vectors_smem[even][dim]),
                    __float_as_uint(vectors_smem[even + 1][dim]));
  }
}

#else  // no TF32

template <>
struct Left<float32> {
  float number[2][8];  // of both rows
};
template <>
struct Right<float32> {
  float number[2][8];  // of both columns
};

template <>
struct Terms<float32> {
  static constexpr int kMost = 1;
  __device__ void add(float (&sum)[4], const Left<float32>& left, const Right<float32>& right) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += left.number[i / 2][k] * right.number[i % 2][k];
  }
  __device__ void finish(float (&)[4]) {}
};
template <int kPitch>
__device__ void load_left(Left<float32>& left, const float32 (*rows_smem)[kPitch], int first, int d,
                          int lane) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      left.number[half][k] = rows_smem[first + half * 8 + lane / 4][d + k];
}
__device__ inline void left_of_weights(Left<float32>& left, const float (*weight)[4], int lane) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      left.number[half][k] =
          __shfl_sync(0xffffffffu, weight[0][2 * half + k % 2], lane / 4 * 4 + k / 2);
}
template <int kPitch, int kTiles>
__device__ void load_right(Right<float32> (&right)[kTiles], const float32 (*vectors_smem)[kPitch],
                           int first, int d, int lane) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        right[tile].number[i][k] = vectors_smem[first + tile * 8 + lane % 4 * 2 + i][d + k];
}
template <int kPitch>
__device__ void load_right_transposed(Right<float32> (&right)[2],
                                      const float32 (*vectors_smem)[kPitch], int first, int d,
                                      int lane) {
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        right[tile].number[i][k] = vectors_smem[first + k][d + tile * 8 + lane % 4 * 2 + i];
}

#endif

}  // namespace cuneigh::fused
