// Copies of the vectors of a warp's rows: from global to shared memory, and results back.
#pragma once

#include "fused/column_copies.cuh"
#include "fused/mma.cuh"

namespace cuneigh::fused {

// Copies a vector [kDim] of each of a warp's rows to shared memory; zeros stand for what lies past
// `dim` and for rows that do not exist.
template <int kDim, int kBytes, typename Plan, typename Element, int kPitch>
__device__ void load_rows(const View<const Element, Plan::kRank>& view, BatchHead from, int dim,
                          const Tables<Plan>& tables, int warp, int lane,
                          Element (*rows_smem)[kPitch]) {
  constexpr int kRows = Plan::kRowTiles * 16;
  constexpr int kChunks = kDim / kChunk<Element>, kLanes = kLanesOf<kChunks>;
  const int first = lane % kLanes * kChunk<Element>;
#pragma unroll 4
  for (int i = lane / kLanes; i < kRows; i += 32 / kLanes) {
    const int row = warp * kRows + i;
    const auto& token = tables.token[row];
    const auto* source = view.at(from.batch, token, from.head) + first;
    const int valid = token[0] >= 0 ? dim - first : 0;
#pragma unroll
    for (int d = 0; d < kDim; d += kLanes * kChunk<Element>)
      copy_16_bytes<kBytes>(element_of(rows_smem, row, d + first), source + d,
                            (valid - d) * int(sizeof(Element)));
  }
}

// Multiplies a warp's rows by the sign of the scale, so that the kernel's own scale is positive.
template <int kDim, typename Plan, typename Element, int kPitch>
__device__ void multiply_by_sign(const FusedProblem<Plan::kRank>& problem,
                                 Element (*rows_smem)[kPitch], int warp, int lane) {
  constexpr int kRows = Plan::kRowTiles * 16;
  for (int i = lane; i < kRows * kDim; i += 32) {
    Element& element = *element_of(rows_smem, warp * kRows + i / kDim, i % kDim);
    element = convert<Element>(float(problem.sign) * convert<float>(element));
  }
  __syncwarp();
}

// Rounds a warp's sums [kRowTiles * 16, kDim] times a factor to shared memory, on their way out.
template <int kDim, int kRowTiles, typename Element>
__device__ void round_rows(const float (&sum)[kRowTiles][kDim / 8][4], float factor, int lane,
                           Element (*rows_smem)[kVectorPitch<Element, kDim>]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(element_of(rows_smem, m * 16 + half * 8 + lane / 4, d * 8 + lane % 4 * 2),
                   sum[m][d][2 * half] * factor, sum[m][d][2 * half + 1] * factor);
}

// Writes kRows rows [kRows, kDim] from shared memory, in the widest packets that the alignment
// allows. `first_row` is the number of the first one in the block.
template <int kDim, int kBytes, int kRows, typename Plan, typename Element, int kPitch>
__device__ void store_rows(const View<Element, Plan::kRank>& view, BatchHead to, int dim,
                           const Tables<Plan>& tables, int first_row,
                           const Element (*rows_smem)[kPitch], int lane) {
  constexpr int kWidth = kBytes / sizeof(Element);
  constexpr int kLanes = kLanesOf<kDim / kWidth>;
  struct alignas(kBytes) Packet {
    Element element[kWidth];
  };
  const int first = lane % kLanes * kWidth;
#pragma unroll 4
  for (int i = lane / kLanes; i < kRows; i += 32 / kLanes) {
    const auto& token = tables.token[first_row + i];
    if (token[0] < 0) continue;
    auto* target = view.at(to.batch, token, to.head) + first;
#pragma unroll
    for (int d = 0; d < kDim; d += kLanes * kWidth)
      if (d + first < dim)
        *reinterpret_cast<Packet*>(target + d) =
            *reinterpret_cast<const Packet*>(element_of(rows_smem, i, d + first));
  }
}

}  // namespace cuneigh::fused
