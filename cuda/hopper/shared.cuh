// What the warps of a block share: tiles of rows, boxes of columns, masks, and barriers.
//
// Rows and columns are arrays of two kinds: query or key (qk, of head_dim) and value or dO (vo, of
// value_dim). For the forward pass rows are queries alone, without dO. In a jvp (kTangents) every
// array comes with its tangent, whose lines lie behind those of the array.
//
// struct Plan {
//   static constexpr int kRank;          token axes
//   static constexpr int kWarpgroups;    boxes of rows of a tile: a consumer each, or two if kPairs
//   static constexpr int kColumns;       columns of a box, 32, 64 or 128
//   static constexpr int kStages;        boxes of columns in shared memory
//   static constexpr int kRowSlots;      boxes of rows in shared memory
//   static constexpr int kHeadDim, kValueDim;  dimensions, padded to multiples of 16
//   static constexpr int kHeadColumns, kValueColumns;  padded to widths that wgmma has
//   static constexpr int kSharedBytes;   of SharedMemory, as the launcher counts them
//   static constexpr bool kBackward;     rows have vo, too
//   static constexpr bool kTangents;     every array comes with its tangent
//   static constexpr bool kRowsAreKeys;  tile.cuh says what that means
//   static constexpr bool kDilated;      some dilation is not 1
//   static constexpr bool kAdditional;   there are additional keys among the columns
//   static constexpr bool kSigned;       scale is not positive
//   static constexpr bool kSums;         tiles add to sums of the columns, too (sums.cuh)
//   static constexpr bool kKeyMask;      there is a key mask
//   static constexpr bool kPairs;        two consumers share a box of rows (dkv_long.cu)
//   static constexpr bool kAhead;        dK of a box is multiplied beside S of the next (dkv.cu)
//   using Element;                       float16 or bfloat16
// };
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/hidden.cuh"
#include "hopper/tile.cuh"
#include "hopper/tma.cuh"

namespace cuneigh::hopper {

constexpr int lines_of(int dim) { return (dim + kLineElements - 1) / kLineElements; }

// Warpgroups of consumers.
template <typename Plan>
constexpr int kConsumers = Plan::kPairs ? 2 * Plan::kWarpgroups : Plan::kWarpgroups;

// Registers of a thread. All warpgroups together have at most the 65536 of a multiprocessor.
// Consumers with few sums (kFew) leave more of them to the producers, who in a backward need them
// only for the windows of parts. With long vectors (kLong) producers need more in any backward.
template <typename Plan>
constexpr bool kFew = Plan::kWarpgroups == 3 && Plan::kValueColumns <= 64 &&
                      (!Plan::kBackward || (Axis::kIsPart && !Plan::kRowsAreKeys));
template <typename Plan>
constexpr bool kLong = Plan::kHeadDim > 128 || Plan::kValueDim > 128;
template <typename Plan>
constexpr int kProducerRegisters = kConsumers<Plan> == 2 ? (Plan::kAhead                     ? 24
                                                            : Plan::kBackward && kLong<Plan> ? 56
                                                                                             : 40)
                                   : kFew<Plan>          ? 56
                                                         : 32;
// Two consumers have what producers leave of 504, since three warpgroups are launched with 168
// each.
template <typename Plan>
constexpr int kConsumerRegisters = kConsumers<Plan> == 2 ? (504 - kProducerRegisters<Plan>) / 2
                                   : kFew<Plan>          ? 152
                                                         : 160;

// A box of columns: its first token, or the first of the additional keys; and whether a mask hides
// some of its keys, but not all.
template <int kRank>
struct ColumnBox {
  int batch, head, token[kRank];
  bool is_additional, has_holes;
};

// Of a box of columns that are queries. What a lane of a quad needs lies side by side; four numbers
// more lie between the lanes' parts, so that they are in different banks.
template <int kColumns>
struct Statistics {
  struct alignas(16) Lane {
    float of_columns[kColumns / 4];
    float gap[4];
  };
  Lane lse[4];  // times log2(e)
  Lane delta[4];

  __device__ void set(int column, float2 lse_and_delta) {
    const int quad = column % 8 / 2, place = column / 8 * 2 + column % 2;
    lse[quad].of_columns[place] = lse_and_delta.x;
    delta[quad].of_columns[place] = lse_and_delta.y;
  }
};
// Columns that are keys have none.
template <>
struct Statistics<0> {
  float4 nothing;
};

// Of a line of the sums of a granule a lane has 16 numbers, four at a time.
constexpr int kGranuleParts = kLineElements / 16;
constexpr int kUnitSlots = 4;

// Whether dS can be too large for its 16 bits, though all operands are finite: then dQ is not
// finite, which no integer says.
template <typename Plan>
constexpr bool kMayOverflow = Plan::kSums && kSame<typename Plan::Element, float16>;

// What a kernel whose tiles add to sums of columns has beside `SharedMemory`: a contribution of
// each warpgroup, the dS of all of them of which contributions are made, of two boxes of columns,
// since a warpgroup may be ahead of the others, and the units that queries are counted in, of as
// many boxes as may be at work: those of all stages, and the one before, whose contribution is not
// made yet.
//
// A contribution is dQ of 64 queries, a line of it. Of vectors of two lines each warpgroup makes
// one of all 64 queries of a box; of vectors of one line, that of half of its 128 queries.
template <typename Plan, bool kSums = Plan::kSums>
struct SumMemory {};
template <typename Plan>
struct SumMemory<Plan, true> {
  static constexpr int kSumLines = lines_of(Plan::kHeadDim);
  static_assert(Plan::kWarpgroups == 2 && Plan::kColumns * kSumLines == 2 * kRows,
                "a warpgroup makes dQ of 64 queries, a line of it");
  static_assert(Plan::kStages < kUnitSlots, "units of the box before are still needed");

  // [queries, keys] of each warpgroup
  typename Plan::Element grad_logit[2][Plan::kWarpgroups][Plan::kColumns][kLineElements];
  int4 sum[Plan::kWarpgroups][kRows / kGranule][kGranuleParts][32];  // of dQ: as a lane has it
  float units[kUnitSlots][Plan::kColumns];                           // of queries

  // What the contribution of warpgroup `w` is: its line, and the first of its queries in a box.
  __device__ static int sum_line(int w) { return kSumLines == 2 ? w : 0; }
  __device__ static int first_query(int w) { return kSumLines == 2 ? 0 : w * kRows; }
};

// What consumers that share a box of rows have beside that: weights P^T [64, kColumns] of two boxes
// of columns, as the threads of a warpgroup hold them for a product.
template <typename Plan, bool kPairs = Plan::kPairs>
struct PairMemory {};
template <typename Plan>
struct PairMemory<Plan, true> {
  uint4 weight[2][Plan::kColumns / 16][128];
};

template <typename Plan>
struct SharedMemory : SumMemory<Plan>, PairMemory<Plan> {
  static constexpr int kQkLines = lines_of(Plan::kHeadDim);
  static constexpr int kVoLines = lines_of(Plan::kValueDim);
  static constexpr int kArrays = Plan::kTangents ? 2 : 1;  // an array, and its tangent
  static constexpr int kRowLines = kArrays * kQkLines + (Plan::kBackward ? kVoLines : 0);
  using Line = typename Plan::Element[kLineElements];

  // [slots][lines of a row][rows][64]; every [rows][64] begins at a multiple of 1024 bytes
  static_assert(!Plan::kSums || sizeof(SumMemory<Plan>) % 1024 == 0, "so does what follows it");
  static_assert(!Plan::kPairs || sizeof(PairMemory<Plan>) % 1024 == 0, "so does what follows it");
  Line row[Plan::kRowSlots][kRowLines][kRows];  // lines of vo, or of the tangent, after those of qk
  Line column_qk[Plan::kStages][kArrays * kQkLines][Plan::kColumns];
  Line column_vo[Plan::kStages][kArrays * kVoLines][Plan::kColumns];
  Statistics<Plan::kRowsAreKeys ? Plan::kColumns : 0> statistics[Plan::kStages];
  MaskTables<Plan> mask;
  AnnouncedTile<Plan> tile[2];
  int visibility[Plan::kStages][Plan::kWarpgroups];
  // If kSums: of the first tile of this block, or of the first granule that it rounds next
  unsigned first_number;
  bool overflows[kUnitSlots];  // if kMayOverflow: whether dS of a box does, in turns as `units`
  // ptxas reads what is read next to each other by 16 bytes at a time, from multiples of 16 on:
  // none of them may be of what other warps write.
  alignas(16) HopperProblem<Plan::kRank> problem;  // for the producers, who have few registers
  alignas(16) ColumnBox<Plan::kRank> last_box;     // whose vo is still to be loaded
  alignas(16) Barrier tile_full[2], tile_empty[2];
  Barrier row_full[Plan::kRowSlots], row_empty[Plan::kRowSlots];
  Barrier qk_full[Plan::kStages], qk_empty[Plan::kStages];
  // If columns are masked, those from kStages on are `vo_came`
  Barrier vo_full[Plan::kStages * (1 + kMaskedColumns<Plan>)], vo_empty[Plan::kStages];
  Barrier sum_full[2], sum_empty[2];  // of each warpgroup's `SumMemory::sum`
  // Of what consumers give each other: `SumMemory::grad_logit`, `PairMemory::weight`
  Barrier exchange_full[2], exchange_empty[2];

  // What TMA completes instead of `vo_full` if a mask hides some of the columns. It is full when
  // these have been set to zero.
  __device__ Barrier& vo_came(unsigned stage) { return vo_full[Plan::kStages + stage]; }
};

constexpr int kMaskWarps = 2, kMaskLanes = 32 * kMaskWarps;  // that make masks

// Calls visit(tile) for every tile of this block, as they are announced: by all lanes of a warp
// if kWarp, else by one.
template <bool kWarp, typename Plan, typename Visit>
__device__ void for_each_tile(SharedMemory<Plan>& smem, Visit visit) {
  for (Ring<2> ring;;) {
    const AnnouncedTile<Plan>& tile = smem.tile[ring.slot()];
    smem.tile_full[ring.slot()].wait(ring.parity());
    if (tile.boxes == kNoTile) break;
    visit(tile);
    ring = {tile.position};
    if (kWarp)
      smem.tile_empty[ring.slot()].arrive_as_warp();
    else
      smem.tile_empty[ring.slot()].arrive();
    ring.advance();
  }
}

// Prepares the memory of the block. Every thread must call it.
template <typename Plan>
__device__ SharedMemory<Plan>& begin_block(const HopperProblem<Plan::kRank>& problem) {
  static_assert(
      sizeof(SharedMemory<Plan>) == Plan::kSharedBytes,
      "'shared_bytes' in cuneigh/_backends/hopper/plan.py counts what SharedMemory holds");
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<SharedMemory<Plan>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = 4 * kConsumers<Plan>;
    constexpr bool kShared = Plan::kSums || Plan::kPairs;  // whether all read all rows
    for (int i = 0; i < 2; ++i) {
      smem.tile_full[i].init(1);
      // Of the producers, those that load columns, make masks, or add to sums
      smem.tile_empty[i].init(1, kMaskWarps + (Plan::kSums ? 1 : 0) + kConsumerWarps);
    }
    for (int i = 0; i < Plan::kRowSlots; ++i) {
      smem.row_full[i].init(1);
      smem.row_empty[i].init(0, kShared ? kConsumerWarps : 4);  // of who reads these rows
    }
    for (int i = 0; i < Plan::kStages; ++i) {
      smem.qk_full[i].init(1, kMaskWarps);  // the loader, and the makers of masks
      if (kMaskedColumns<Plan>) {
        smem.vo_full[i].init(0, kMaskWarps);
        smem.vo_came(i).init(1);
      } else {
        smem.vo_full[i].init(1);
      }
      smem.qk_empty[i].init(0, kConsumerWarps);
      smem.vo_empty[i].init(0, kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      smem.sum_full[i].init(0, 4);
      smem.sum_empty[i].init(0, 1);
      smem.exchange_full[i].init(0, Plan::kPairs ? 4 : kConsumerWarps);
      smem.exchange_empty[i].init(0, Plan::kPairs ? 4 : kConsumerWarps);
    }
    fence_barrier_init();
  }
  if (threadIdx.x == 32) smem.problem = problem;
  fill_mask_tables(problem, smem.mask);
  if constexpr (kMayOverflow<Plan>)
    if (threadIdx.x < kUnitSlots) smem.overflows[threadIdx.x] = false;
  __syncthreads();
  return smem;
}

}  // namespace cuneigh::hopper
