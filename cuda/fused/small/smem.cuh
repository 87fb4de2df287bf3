// The shared memory of a block of the small-window kernels, and how columns lie in it.
#pragma once

#include "cuneigh/tma.cuh"
#include "fused/mma.cuh"
#include "fused/rows.cuh"
#include "fused/small/units.cuh"
#include "fused/vectors.cuh"

namespace cuneigh::fused::small {

// A column is whole lines of 128 bytes: its qk vector, then its vo vector. Chunk i of 16 bytes of a
// line lies where chunk i ^ phase would. Eight columns that follow each other in a tile have
// different phases, so that the same chunk of all of them is read from different banks, and copies
// fill whole lines.
//
// Where TMA brings stages, as a kernel compiled with CUNEIGH_TMA has it, the qk vectors of all
// columns come before all vo vectors, and fused/small/boxes.cuh says how they lie.
#ifdef CUNEIGH_TMA
constexpr bool kByTma = true;
#else
constexpr bool kByTma = false;
#endif
template <typename Plan>
constexpr int kColumnBytes =
    kByTma ? 2 * Plan::kHeadDim : (Plan::kHeadDim + Plan::kValueDim + 63) / 64 * 128;
constexpr int kBoxAlignment = 1024;

// The address of a chunk of a column. `column` is the address of the column plus 16 * phase.
__device__ inline unsigned chunk_address(unsigned column, int chunk) {
  return (column + chunk / 8 * 128) ^ chunk % 8 * 16;
}
// Likewise, of kernels that TMA may bring stages for.
template <typename Plan>
__device__ unsigned chunk_address(const SmallWindowProblem<Plan::kRank>& problem, unsigned column,
                                  int chunk) {
  if (!kByTma) return chunk_address(column, chunk);
  constexpr int kQkChunks = Plan::kHeadDim / 8;
  return (column ^ chunk % kQkChunks * 16) + (chunk < kQkChunks ? 0 : problem.vo_offset);
}

// A column of the stage: where it lies in the stage, as `chunk_address` takes it, and units from
// the first column of the stage to its vectors; where columns are queries, to its statistics, too,
// where they are masked keys, to what the mask says of it.
struct alignas(16) ColumnOffsets {
  unsigned in_stage, qk, vo, extra;
};

template <typename Plan>
constexpr bool kMaskedColumns = Plan::kKeyMask && !Plan::kRowsAreKeys;

// What there is of every column beside its vectors.
template <bool kMasked>
struct ExtraOf {
  using Type = float2;  // statistics, where columns are queries
};
template <>
struct ExtraOf<true> {
  using Type = const bool;  // whether it may be seen
};
template <typename Plan>
using Extra = typename ExtraOf<kMaskedColumns<Plan>>::Type;

// Bits of those columns of a tile that a lane has: 2 * (lane % 4) and the one after of every 8.
template <bool kLong>
struct LaneBitsOf {
  using Type = unsigned;
};
template <>
struct LaneBitsOf<true> {
  using Type = unsigned long long;
};
template <typename Plan>
using LaneBits = typename LaneBitsOf<(Plan::kColumns > 128)>::Type;

// The columns that lie in the windows of a lane's rows, lane / 4 and lane / 4 + 8.
template <typename Plan>
struct alignas(2 * sizeof(LaneBits<Plan>)) LaneMasks {
  LaneBits<Plan> row[2];

  __device__ void operator&=(LaneBits<Plan> bits) { row[0] &= bits, row[1] &= bits; }
};

template <typename Plan>
struct SmallTables {
  using Element = typename Plan::Element;
  static constexpr int kRows = Plan::kWarps * 16;

  // For every axis from the second on and every i up to the tile's extent along it, one after
  // another: the columns of a tile whose coordinate is below i, as bits for each of four lanes
  LaneBits<Plan> prefix_mask[Plan::kTileExtents][4];
  alignas(8) int tile_offset[Plan::kColumns];   // bytes in the stage from a warp's first column to
                                                // the column in each slot
  Range block_union[Plan::kRank];               // of the block's rows
  Range warp_union[Plan::kWarps][Plan::kRank];  // of each warp's rows
  Range window[kRows][Plan::kRank];             // empty where there is no row
  bool exists[kRows];
  RowBox<Plan::kRank> rows;
  int stage_columns;
  int stage_bytes;
  int stages;                    // that the block's window union is cut into
  Origin<const Element> qk, vo;  // of the first column of the block
  Origin<Extra<Plan>> extra;     // likewise, if columns have any
};

// Instead of a tile: none of the warp's rows has a column of this stage in its window.
constexpr unsigned kNoTile = ~0u;

// The dynamic shared memory: tables, kBuffers times the block's rows, kBuffers times a stage, the
// offsets of a stage's columns, if they are needed, their statistics where they are queries, for
// every stage the tiles of all warps, and what is known of masked columns. `kRowDim` elements of a
// row are kept.
template <typename Plan, int kRowDim>
struct SmallSmem {
  using Element = typename Plan::Element;
  static_assert(
      sizeof(SmallTables<Plan>) == Plan::kTableBytes,
      "`table_bytes` in cuneigh/_backends/fused/small/forms.py counts what SmallTables holds");

  static constexpr int kRows = SmallTables<Plan>::kRows;
  // Whether TMA brings rows, too: it does where they have several vectors
  static constexpr bool kRowBoxes = kByTma && kRowDim > Plan::kHeadDim;
  static constexpr int kPitch = kRowBoxes ? kRowDim : kVectorPitch<Element, kRowDim>;

  SmallTables<Plan> tables;
  alignas(128) Element row[Plan::kBuffers][kRows][kPitch];  // [kRows, kRowDim] in each buffer
  alignas(128) char stage[1];                               // [stage_bytes] in each buffer

  __device__ unsigned stage_address(int buffer) {
    unsigned first = shared_address(stage);
    if (kByTma) first = kRowBoxes ? box_address() + sizeof(row) : box_address();
    return first + (Plan::kBuffers == 1 ? 0 : buffer * tables.stage_bytes);
  }
  // Where TMA brings boxes: of rows, if it does, and then of columns.
  __device__ unsigned box_address() {
    const unsigned first = kRowBoxes ? shared_address(row) : shared_address(stage);
    return (first + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  }
  // Of a warp's rows that TMA brings, in one of the arrays: [16, kHeadDim].
  __device__ unsigned row_address(int array, int warp) {
    return box_address() + (array * kRows + warp * 16) * 2 * Plan::kHeadDim;
  }
  // Of the columns of a stage: [stage_columns].
  __device__ ColumnOffsets* column_offsets() {
    return reinterpret_cast<ColumnOffsets*>(stage + (kByTma ? kBoxAlignment : 0) +
                                            Plan::kBuffers * tables.stage_bytes);
  }
  // Of a column; where TMA brings the vectors, that is all there is of the offsets.
  __device__ unsigned& extra_offset(int column) {
    return kByTma ? reinterpret_cast<unsigned*>(column_offsets())[column]
                  : column_offsets()[column].extra;
  }
  // Of the columns of the stage at hand, where they are queries, in each buffer: [stage_columns].
  __device__ float2* statistics() {
    const int columns = tables.stage_columns;
    const int units = !kByTma ? columns : Plan::kRowsAreKeys ? ceil_div(columns, 4) : 0;
    return reinterpret_cast<float2*>(column_offsets() + units);
  }
  // What is visible to a lane's rows of the warp's tile in a stage: [stages, kWarps, 32].
  __device__ LaneMasks<Plan>& visible(int stage, int warp, int lane) {
    auto* masks = reinterpret_cast<LaneMasks<Plan>*>(
        statistics() + (Plan::kRowsAreKeys ? Plan::kBuffers * tables.stage_columns : 0));
    return masks[(stage * Plan::kWarps + warp) * 32 + lane];
  }
  // Where the first column of a warp's tile lies in a stage, plus 16 times its phase, or by TMA its
  // number in the stage; or kNoTile: [stages, kWarps].
  __device__ unsigned& tile(int stage, int warp) {
    auto* tiles = reinterpret_cast<unsigned*>(&visible(tables.stages, 0, 0));
    return tiles[stage * Plan::kWarps + warp];
  }
  // Of masked columns: a bit for each one of the stage at hand that may be seen.
  __device__ unsigned* seen() { return &tile(tables.stages, 0); }
};

}  // namespace cuneigh::fused::small
