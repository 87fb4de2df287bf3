// The matrix products of a warpgroup's 64 rows with a box of columns.
#pragma once

#include "hopper/tile.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace cuneigh::hopper {

constexpr int kDescriptorBytes = 16;  // the unit of the addresses in a descriptor

// Issues product = rows columns^T, or product += it if kAdd, [kRows, kColumns] = [kRows, kDim]
// [kColumns, kDim]^T. Both lie in shared memory, in lines of 64 elements: line after line of all
// rows.
template <typename Element, int kDim, int kColumns, bool kAdd = false>
__device__ void multiply(float (&product)[kColumns / 8][4], Descriptor rows, Descriptor columns) {
  fence_registers();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const int line = step / 4, inside = step % 4 * 32;
    const Descriptor left = rows + (line * kRows * kLineBytes + inside) / kDescriptorBytes;
    const Descriptor right = columns + (line * kColumns * kLineBytes + inside) / kDescriptorBytes;
    if (step == 0 && !kAdd)
      Wgmma<kColumns, Element>::template shared<false>(product, left, right);
    else
      Wgmma<kColumns, Element>::template shared<true>(product, left, right);
  }
  commit_products();
}

// Issues sum += weight columns, [kRows, kDim] += [kRows, 16 kSteps] [16 kSteps, kDim]. The box in
// shared memory may have more columns; those from number `first` on are taken.
template <typename Element, int kDim, int kSteps>
__device__ void accumulate(float (&sum)[kDim / 8][4], const unsigned (&weight)[kSteps][4],
                           Descriptor columns, int first = 0) {
  fence_registers();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    Wgmma<kDim, Element>::registers(sum, weight[step],
                                    columns + (first + 16 * step) * kLineBytes / kDescriptorBytes);
  commit_products();
}

// The columns from `first` on of `weight` [kRows, 8 kTiles] as the left operand of `accumulate`,
// [kRows, 16 kSteps].
template <typename Element, int kSteps, int kTiles>
__device__ void pack_weights(const float (&weight)[kTiles][4], int first,
                             unsigned (&packed)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& tile = weight[first / 8 + 2 * step + i / 2];
      packed[step][i] = pack(tile[2 * (i % 2)], tile[2 * (i % 2) + 1], Element());
    }
}

// Whether the numbers of an operand in float16 are finite.
template <int kSteps>
__device__ bool are_finite(const unsigned (&operand)[kSteps][4]) {
  unsigned largest = 0;
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i)
    largest = __vmaxu2(largest, operand[i / 4][i % 4] & 0x7fff7fffu);
  return (largest & 0xffff) < 0x7c00 && largest >> 16 < 0x7c00;
}

// Where `store_transposed` writes what thread number `thread` of a warpgroup gives it, in bytes
// from the first line on.
__device__ inline unsigned place_transposed(int thread) {
  // Lanes 8 m to 8 m + 7 say where the lines of the matrix m of 8 x 8 elements go; its columns are
  // rows of the operand, 16 of which are a warp's
  const int lane = thread % 32, matrix = lane / 8, inside = lane % 8;
  const int line = matrix / 2 * 8 + inside, chunk = thread / 32 * 2 + matrix % 2;
  return line * kLineBytes + (chunk ^ inside) * 16;
}

// Writes a left operand [kRows, 16 kSteps] of this warpgroup, transposed, into a tile of lines
// [16 kSteps][kRows] in shared memory, swizzled as TMA would. `address` is `place_transposed` after
// that of the tile.
template <int kSteps>
__device__ void store_transposed(const unsigned (&operand)[kSteps][4], unsigned address) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     address + step * 16 * kLineBytes),
                 "r"(operand[step][0]), "r"(operand[step][1]), "r"(operand[step][2]),
                 "r"(operand[step][3])
                 : "memory");
}

// Issues product = left^T right, [kRows, kColumns] = [kTiles kRows, kRows]^T [kTiles kRows,
// kColumns], from what `store_transposed` has written, in tiles that lie `left_bytes` apart, and
// from tiles of rows that lie `right_bytes` apart.
template <typename Element, int kTiles, int kColumns>
__device__ void multiply_transposed(float (&product)[kColumns / 8][4], Descriptor left,
                                    int left_bytes, Descriptor right, int right_bytes) {
  fence_registers();
#pragma unroll
  for (int step = 0; step < kTiles * kRows / 16; ++step) {
    const int tile = step / 4, inside = step % 4;
    const Descriptor a = left + (tile * left_bytes + inside * 32) / kDescriptorBytes;
    const Descriptor b = right + (tile * right_bytes + inside * 16 * kLineBytes) / kDescriptorBytes;
    if (step == 0)
      Wgmma<kColumns, Element>::template shared_columns<false>(product, a, b);
    else
      Wgmma<kColumns, Element>::template shared_columns<true>(product, a, b);
  }
  commit_products();
}

}  // namespace cuneigh::hopper
