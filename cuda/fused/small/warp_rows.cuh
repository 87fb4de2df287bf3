// The sixteen rows of a warp: their way in, as operands of products, and results on their way out.
#pragma once

#include "fused/async.cuh"
#include "fused/small/units.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused::small {

// Copies one vector [kDim] of each row to the dimensions from `first_dim` on of the rows in shared
// memory. kOffset is the member of Offsets that says how many units away a row's vector is.
template <int kDim, auto kOffset, typename Offsets, typename Element, int kPitch>
__device__ void load_warp_rows(const Element* source, const Offsets* offsets, int lane,
                               Element (*rows_smem)[kPitch], int first_dim) {
  constexpr int kChunks = kDim / 8, kStride = 32 / kChunks;
  const int chunk = lane % kChunks * 8, first = lane / kChunks;
  unsigned units[16 / kStride];
#pragma unroll
  for (int i = 0; i < 16 / kStride; ++i) units[i] = offsets[first + i * kStride].*kOffset;
#pragma unroll
  for (int i = 0; i < 16 / kStride; ++i)
    copy_16_bytes(shared_address(element_of(rows_smem, first + i * kStride, first_dim + chunk)),
                  offset_by(source + chunk, units[i]));
}

// rows[0 : 16, d : d + 16] as the left operand of a product.
template <typename Element, int kPitch>
__device__ void load_row_operand(const Element (*rows_smem)[kPitch], int d, int lane,
                                 unsigned (&operand)[4]) {
  ldmatrix_x4(operand, address_of(rows_smem, 0, lane % 16, d, lane / 16 * 8));
}

// Writes sum * factor of one of a lane's two rows, `half` saying which, if that row exists, or
// zeros if it is hidden. Lanes swap words in pairs so that four of them fill 32 bytes, which is
// what memory is written in.
template <int kDim, typename Element>
__device__ void store_row(const float (&sum)[kDim / 8][4], int half, float factor, bool exists,
                          int lane, Element* row, bool is_hidden = false) {
  const bool odd = lane % 2;
  row += lane % 2 * 8 + lane / 2 % 2 * 4;
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned word[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      word[i] =
          pack(sum[d / 8 + i][2 * half] * factor, sum[d / 8 + i][2 * half + 1] * factor, Element());
#pragma unroll
    for (unsigned& each : word) each = is_hidden ? 0 : each;
    const unsigned received = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
    if (exists)
      __stcs(reinterpret_cast<uint2*>(row + d),
             odd ? make_uint2(received, word[1]) : make_uint2(word[0], received));
  }
}

}  // namespace cuneigh::fused::small
