// Copies of vectors between global and shared memory: a box of columns in, a block's rows in, and a
// warp's rows out.
#pragma once

#include "fused/async.cuh"
#include "fused/fused.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused {

// How many neighboring lanes take a vector of so many pieces.
template <int kPieces>
constexpr int kLanesOf = kPieces % 8 == 0   ? 8
                         : kPieces % 4 == 0 ? 4
                                            : 2;

// How a block copies the vectors of a box of columns.
template <typename Plan, int kDim>
struct ColumnCopy {
  using Element = typename Plan::Element;
  static constexpr int kChunks = kDim / kChunk<Element>;
  static constexpr int kLanes = kLanesOf<kChunks>;
  static constexpr int kAtOnce = Plan::kWarps * 32 / kLanes;
  static constexpr int kPasses = (Plan::kColumns + kAtOnce - 1) / kAtOnce;
  static constexpr bool kEven = Plan::kColumns % kAtOnce == 0;

  // The column that a thread copies in a pass, or the last where there is none.
  __device__ static int column(int pass, unsigned thread) {
    const int column = pass * kAtOnce + thread / kLanes;
    return kEven ? column : smaller(column, Plan::kColumns - 1);
  }

  // Zeros stand for columns that no row meets; kExact promises dim == kDim.
  template <int kBytes, bool kExact>
  __device__ static void run(const Element* first_column, const long long (&step)[kPasses],
                             unsigned long long exists, int dim, unsigned thread,
                             Element (*columns_smem)[kVectorPitch<Element, kDim>]) {
    const unsigned first = thread / kLanes, lane = thread % kLanes;
    const char* lane_column = reinterpret_cast<const char*>(first_column) + lane * 16;
    exists >>= first;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const unsigned column = pass * kAtOnce + first;
      if (!kEven && column >= Plan::kColumns) break;
      const char* source = lane_column + step[pass];
#pragma unroll(kAsync ? 64 : 2)  // what is on its way takes registers where copies are not async
      for (int i = 0; i < kChunks; i += kLanes) {
        const unsigned place = (i + lane) * kChunk<Element>;
        const int valid = kExact ? 16 : (dim - int(place)) * int(sizeof(Element));
        copy_16_bytes<kBytes>(place_of(columns_smem, column, place), source + i * 16,
                              exists >> pass * kAtOnce & 1 ? valid : 0);
      }
    }
  }
};

// Copies the vectors of a box of columns. All that is read of shared memory is read first: behind
// copies it would wait for long.
template <typename Plan, typename Element>
__device__ void load_columns(const FusedProblem<Plan::kRank>& problem,
                             const ColumnBox<Plan>& columns, const Tables<Plan>& tables, int thread,
                             Element (*first_smem)[kVectorPitch<Element, Plan::kHeadDim>],
                             Element (*second_smem)[kVectorPitch<Element, Plan::kValueDim>]) {
  using First = ColumnCopy<Plan, Plan::kHeadDim>;
  using Second = ColumnCopy<Plan, Plan::kValueDim>;
  const auto* first_column = columns.first;
  const auto* second_column = columns.second;
  const unsigned long long exists = columns.exists;
  const ColumnSteps* steps = tables.steps[Plan::kAdditional && columns.additional];
  long long first_step[First::kPasses], second_step[Second::kPasses];
#pragma unroll
  for (int pass = 0; pass < First::kPasses; ++pass)
    first_step[pass] = steps[First::column(pass, thread)].first;
#pragma unroll
  for (int pass = 0; pass < Second::kPasses; ++pass)
    second_step[pass] = steps[Second::column(pass, thread)].second;
  First::template run<Plan::kKeyBytes, Plan::kKeyExact>(first_column, first_step, exists,
                                                        problem.head_dim, thread, first_smem);
  Second::template run<Plan::kValueBytes, Plan::kValueExact>(
      second_column, second_step, exists, problem.value_dim, thread, second_smem);
}

// Copies the vectors of a warp's rows.
template <int kDim, int kBytes, typename Plan, typename Element, int kPitch>
__device__ void load_rows(const View<const Element, Plan::kRank>& view, Entry entry, int dim,
                          const Tables<Plan>& tables, int warp, int lane,
                          Element (*rows_smem)[kPitch]) {
  constexpr int kRows = Plan::kRowTiles * 16;
  constexpr int kChunks = kDim / kChunk<Element>, kLanes = kLanesOf<kChunks>;
  const int first = lane % kLanes * kChunk<Element>;
#pragma unroll 4
  for (int i = lane / kLanes; i < kRows; i += 32 / kLanes) {
    const int row = warp * kRows + i;
    const auto& token = tables.token[row];
    const auto* source = view.at(entry.batch, token, entry.head) + first;
    const int valid = token[0] >= 0 ? dim - first : 0;
#pragma unroll
    for (int d = 0; d < kDim; d += kLanes * kChunk<Element>)
      copy_16_bytes<kBytes>(place_of(rows_smem, row, d + first), source + d,
                            (valid - d) * int(sizeof(Element)));
  }
}

// Gives a warp's rows the sign of the scale, so that the scale itself is positive.
template <int kDim, typename Plan, typename Element, int kPitch>
__device__ void sign_rows(const FusedProblem<Plan::kRank>& problem, Element (*rows_smem)[kPitch],
                          int warp, int lane) {
  constexpr int kRows = Plan::kRowTiles * 16;
  for (int i = lane; i < kRows * kDim; i += 32) {
    Element& element = *place_of(rows_smem, warp * kRows + i / kDim, i % kDim);
    element = convert<Element>(float(problem.sign) * convert<float>(element));
  }
  __syncwarp();
}

// Writes the rows from `first_row` on from shared memory in the widest packets that the alignment
// allows.
template <int kDim, int kBytes, int kRows, typename Plan, typename Element, int kPitch>
__device__ void store_rows(const View<Element, Plan::kRank>& view, Entry entry, int dim,
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
    auto* target = view.at(entry.batch, token, entry.head) + first;
#pragma unroll
    for (int d = 0; d < kDim; d += kLanes * kWidth)
      if (d + first < dim)
        *reinterpret_cast<Packet*>(target + d) =
            *reinterpret_cast<const Packet*>(place_of(rows_smem, i, d + first));
  }
}

}  // namespace cuneigh::fused
