// Copies of the vectors of a box of columns from global to shared memory, by a whole block.
#pragma once

#include "fused/async.cuh"
#include "fused/tables.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused {

// How many neighboring lanes share a vector of so many packets.
template <int kPackets>
constexpr int kLanesOf = kPackets % 8 == 0   ? 8
                         : kPackets % 4 == 0 ? 4
                                             : 2;

// How a block copies one of the two vectors of every column: kLanes lanes take a column, and the
// block takes kAtOnce columns in each of kPasses passes.
template <typename Plan, int kDim>
struct ColumnCopy {
  using Element = typename Plan::Element;
  static constexpr int kChunks = kDim / kChunk<Element>;
  static constexpr int kLanes = kLanesOf<kChunks>;
  static constexpr int kAtOnce = Plan::kWarps * 32 / kLanes;
  static constexpr int kPasses = (Plan::kColumns + kAtOnce - 1) / kAtOnce;
  static constexpr bool kEven = Plan::kColumns % kAtOnce == 0;

  // The slot that a thread copies in a pass, or the last one where there is none.
  __device__ static int slot(int pass, unsigned thread) {
    const int slot = pass * kAtOnce + thread / kLanes;
    return kEven ? slot : smaller(slot, Plan::kColumns - 1);
  }

  // `offset` holds the bytes to the column of each pass. Slots that are not `present` get zeros.
  // kExact promises dim == kDim.
  template <int kBytes, bool kExact>
  __device__ static void run(const Element* first_column, const long long (&offset)[kPasses],
                             ColumnMask present, int dim, unsigned thread,
                             Element (*columns_smem)[kVectorPitch<Element, kDim>]) {
    const unsigned first = thread / kLanes, lane = thread % kLanes;
    const char* lane_column = reinterpret_cast<const char*>(first_column) + lane * 16;
    present >>= first;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const unsigned slot = pass * kAtOnce + first;
      if (!kEven && slot >= Plan::kColumns) break;
      const char* source = lane_column + offset[pass];
#pragma unroll(kAsync ? 64 : 2)  // what is on its way takes registers where copies are not async
      for (int i = 0; i < kChunks; i += kLanes) {
        const unsigned d = (i + lane) * kChunk<Element>;
        const int valid = kExact ? 16 : (dim - int(d)) * int(sizeof(Element));
        copy_16_bytes<kBytes>(element_of(columns_smem, slot, d), source + i * 16,
                              present >> pass * kAtOnce & 1 ? valid : 0);
      }
    }
  }
};

// The element of `moved` that lies there as `element` lies in `view`.
template <typename Element, int kRank>
__device__ const Element* like(const Element* element, const View<const Element, kRank>& view,
                               const View<const Element, kRank>& moved) {
  return moved.data + (element - view.data);
}

// Copies both vectors of all columns of a box, or the first ones alone unless kVo. Everything that
// is read of shared memory is read before the first copy: behind copies a read would wait for long.
template <typename Plan, bool kVo = true, typename Element>
__device__ void load_columns(const FusedProblem<Plan::kRank>& problem,
                             const ColumnBox<Plan>& columns, const Tables<Plan>& tables, int thread,
                             Element (*qk_smem)[kVectorPitch<Element, Plan::kHeadDim>],
                             Element (*vo_smem)[kVectorPitch<Element, Plan::kValueDim>]) {
  using QkCopy = ColumnCopy<Plan, Plan::kHeadDim>;
  using VoCopy = ColumnCopy<Plan, Plan::kValueDim>;
  const auto* first_qk = columns.qk;
  const auto* first_vo = columns.vo;
  const ColumnMask present = columns.present;
  const VectorOffsets* offsets = tables.vector_offset[Plan::kAdditional && columns.additional];
  long long qk_offset[QkCopy::kPasses], vo_offset[VoCopy::kPasses];
#pragma unroll
  for (int pass = 0; pass < QkCopy::kPasses; ++pass)
    qk_offset[pass] = offsets[QkCopy::slot(pass, thread)].qk;
#pragma unroll
  for (int pass = 0; pass < VoCopy::kPasses; ++pass)
    if (kVo) vo_offset[pass] = offsets[VoCopy::slot(pass, thread)].vo;
  QkCopy::template run<Plan::kKeyBytes, Plan::kKeyExact>(first_qk, qk_offset, present,
                                                         problem.head_dim, thread, qk_smem);
  if constexpr (kVo)
    VoCopy::template run<Plan::kValueBytes, Plan::kValueExact>(first_vo, vo_offset, present,
                                                               problem.value_dim, thread, vo_smem);
}

}  // namespace cuneigh::fused
