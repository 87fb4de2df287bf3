// Keys that a mask hides from all queries (cuneigh/key_mask.cuh).
//
// A hidden column has no weight, but what lies in its vectors, be it NaN, is multiplied by that. So
// the warps that make masks set hidden columns to zero in shared memory, in boxes that have some.
// Boxes that have nothing else are not loaded. Rows do not meet each other: those that are hidden
// get zeros for results (`store_row`), and tiles of nothing else visit no columns. Only where rows
// count in sums of columns they are set to zero, too.
#pragma once

#include "cuneigh/key_mask.cuh"
#include "hopper/mask.cuh"
#include "hopper/tma.cuh"

namespace cuneigh::hopper {

template <typename Plan>
constexpr bool kMaskedColumns = Plan::kKeyMask && !Plan::kRowsAreKeys;

// What a kernel with masked columns has beside `SharedMemory`: how far each column of a box is from
// the first in the array of the mask. A lane looks after the columns 8 (lane / 2) + 2 quad +
// lane % 2, for which its bit stands in the words of a quad.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct MaskMemory {
  __device__ void fill(const HopperProblem<Plan::kRank>&, const KeyMask<Plan>&) {}
};
template <typename Plan>
struct MaskMemory<Plan, true> {
  long long mask_offset[32][4];  // [lane][quad]

  // Every thread of the block must call it.
  __device__ void fill(const HopperProblem<Plan::kRank>& problem, const KeyMask<Plan>& mask) {
    if (threadIdx.x >= Plan::kColumns) return;
    const int lane = threadIdx.x / 4, quad = threadIdx.x % 4;
    int column = 8 * (lane / 2) + 2 * quad + lane % 2;
    long long offset = 0;
#pragma unroll
    for (int r = Plan::kRank - 1; r >= 0; --r) {
      const int steps = column % problem.column_box[r] * axis_of<Plan>(problem, r).dilation;
      offset += steps * mask.key_mask.token[r];
      column /= problem.column_box[r];
    }
    mask_offset[lane][quad] = offset;
  }
};

// Those of a lane's four columns that are keys, and those of them that may be seen: bit q stands
// for the column of quad q.
struct LaneKeys {
  unsigned given, seen;

  // In every lane of a warp the same.
  __device__ bool any_is_seen() const { return __any_sync(0xffffffffu, seen); }
  __device__ bool any_is_hidden() const { return __any_sync(0xffffffffu, given != seen); }
  // The word of the columns that no mask hides, of a row that sees all of them.
  __device__ QuadWords words() const {
    QuadWords words;
#pragma unroll
    for (int quad = 0; quad < 4; ++quad)
      words.word[quad] = __ballot_sync(0xffffffffu, (seen | ~given) >> quad & 1);
    return words;
  }
};

// The keys of the box of columns that begins at `first`, which counts from the first of the tile.
template <typename Plan, typename Smem>
__device__ LaneKeys keys_of_box(const KeyMask<Plan>& mask, const Smem& smem,
                                const Tile<Plan::kRank>& tile, int lane,
                                const int (&first)[Plan::kRank]) {
  const auto& problem = smem.problem;
  const bool* at = mask.key_mask.at(tile.batch, 0);
  LaneKeys keys = {lane < Plan::kColumns / 4 ? 0xfu : 0u, 0};
#pragma unroll 1
  for (int r = 0; r < Plan::kRank; ++r) {
    asm volatile("" ::: "memory");  // registers are few: sizes are read again
    int begin = first[0];
#pragma unroll
    for (int other = 1; other < Plan::kRank; ++other)
      if (r == other) begin = first[other];
    const Axis axis = axis_of<Plan>(problem, r);
    const int group = column_group<Plan>(problem, tile, r);
    const int token = axis.token({group, tile.columns[r].begin + begin});
    at += token * mask.key_mask.token[r];
    const int left = axis.key_length - token, size = problem.column_box[r];
    if (left <= (size - 1) * axis.dilation) {  // the box goes past the end
      const int count = larger(axis.dilation == 1 ? left : ceil_div(left, axis.dilation), 0);
      const QuadWords& inside = smem.mask.prefix[smem.mask.prefix_base[r] + count];
#pragma unroll
      for (int quad = 0; quad < 4; ++quad)
        if (!(inside.word[quad] >> lane & 1)) keys.given &= ~(1u << quad);
    }
  }
#pragma unroll
  for (int quad = 0; quad < 4; ++quad)
    if (keys.given >> quad & 1) keys.seen |= at[smem.mask_offset[lane][quad]] << quad;
  return keys;
}

// Sets a vector of a box, in `lines` [kLines][kTokens] of 64 elements, to zero.
template <int kLines, int kTokens, typename Line>
__device__ void clear(Line (&lines)[kLines][kTokens], int token) {
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    auto* chunks = reinterpret_cast<uint4*>(lines[line][token]);
#pragma unroll 1
    for (int i = 0; i < kLineBytes / 16; ++i)  // neighbors write to different banks
      chunks[i ^ token % 8] = make_uint4(0, 0, 0, 0);
  }
}

// Sets rows of a tile that see nothing to zero, if kMaskedRows; `rows` is the place of the first
// warpgroup's. The columns that the calling warp announces next come after that.
template <typename Plan, typename Smem>
__device__ void clear_rows(Smem& smem, Ring<Plan::kRowSlots> rows, int lane) {
#pragma unroll 1
  for (int w = 0; w < Plan::kWarpgroups; ++w, rows.advance()) {
    smem.row_full[rows.slot()].wait(rows.parity());
#pragma unroll 1
    for (int row = lane; row < kRows; row += 32) {  // along a single axis a row is a coordinate
      const Range window = smem.mask.coordinate[w * kRows + row].window;
      if (window.begin == window.end) clear(smem.row[rows.slot()], row);
    }
  }
  fence_shared();
}

// Whether the mask shows any of the keys that are the rows of warpgroup `w`; `at` is where the mask
// is for the tokens that are chosen along the axes before kAxis.
template <typename Plan, int kAxis = 0>
__device__ bool any_row_is_seen(const HopperProblem<Plan::kRank>& problem,
                                const KeyMask<Plan>& mask, const Tile<Plan::kRank>& tile, int w,
                                const bool* at) {
  const Axis axis = axis_of<Plan>(problem, kAxis);
  const GroupIndex first = tile.first[kAxis];
  int token = axis.token({first.group, first.index + problem.warpgroup[w][1 + kAxis]});
  const int end = smaller(token + problem.row_box[kAxis] * axis.dilation, axis.key_length);
#pragma unroll 1
  for (; token < end; token += axis.dilation) {
    asm volatile("" ::: "memory");  // registers are few: sizes are read again
    const bool* mine = at + token * mask.key_mask.token[kAxis];
    if constexpr (kAxis == Plan::kRank - 1) {
      if (*mine) return true;
    } else {
      if (any_row_is_seen<Plan, kAxis + 1>(problem, mask, tile, w, mine)) return true;
    }
  }
  return false;
}

// What a lane of the warps that make masks does to the box of columns before the current one, when
// that has come: it sets its columns that are hidden to zero. Two warps share those of each lane.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct Cleaner {
  template <typename Smem>
  __device__ void clean(Smem&, Ring<Plan::kStages>, int) {}
  __device__ void expect(unsigned) {}
};
template <typename Plan>
struct Cleaner<Plan, true> {
  static constexpr unsigned kNoBox = ~0u;
  unsigned hidden = kNoBox;

  // Bit q stands for the lane's column of quad q.
  __device__ void expect(unsigned hidden_columns) { hidden = hidden_columns; }

  // `next` is the place of the current box.
  template <typename Smem>
  __device__ void clean(Smem& smem, Ring<Plan::kStages> next, int lane) {
    if (hidden == kNoBox) return;
    const Ring<Plan::kStages> box = next.before();
    if (__any_sync(0xffffffffu, hidden)) {
      smem.qk_full[box.slot()].wait(box.parity());
      smem.vo_full[box.slot()].wait(box.parity());
#pragma unroll 1
      for (int quad = lane / 32; quad < 4; quad += 2) {
        const int column = lane % 32 / 2 * 8 + 2 * quad + lane % 2;
        if (!(hidden >> quad & 1)) continue;
        clear(smem.column_vo[box.slot()], column);
        if constexpr (Plan::kBackward) clear(smem.column_qk[box.slot()], column);
      }
      fence_shared();
    }
    smem.clean(box.slot()).arrive_as_warp();
    hidden = kNoBox;
  }
};

}  // namespace cuneigh::hopper
