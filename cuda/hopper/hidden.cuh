// Keys that a mask hides from all queries (cuneigh/key_mask.cuh).
//
// A hidden column has no weight, but what lies in its vectors, be it NaN, is multiplied by that. So
// the warps that make masks set hidden columns to zero in shared memory, in boxes that have some.
// Boxes that have nothing else are not loaded. Rows do not meet each other: those that are hidden
// get zeros for results (`store_row`), and tiles of nothing else visit no columns. Only where rows
// count in sums of columns they are set to zero, too.
#pragma once

#include "hopper/mask.cuh"
#include "hopper/results.cuh"
#include "hopper/tma.cuh"

namespace cuneigh::hopper {

// Sets a vector of a box, in `lines` [kLines][kTokens] of 64 elements, to zero.
template <int kLines, int kTokens, typename Line>
__device__ void clear(Line (&lines)[kLines][kTokens], int token) {
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    auto* chunks = reinterpret_cast<uint4*>(lines[line][token]);
#pragma unroll
    for (int i = 0; i < kLineBytes / 16; ++i)  // neighbors write to different banks
      chunks[i ^ token % 8] = make_uint4(0, 0, 0, 0);
  }
}

// Finds the rows of a tile that the mask hides, where they count in sums of columns, and sets them
// to zero, by the lanes of the warps that make masks; `rows` is the place of the first warpgroup's.
// No box is then seen whole. Consumers go on when these warps arrive at `qk_full` of the tile's
// first box. All lanes wait for the rows of every tile: a parity says only which of two phases is
// over.
template <typename Plan, typename Smem>
__device__ void hide_rows(const HiddenKeys<Plan>& mask, const Tile<Plan::kRank>& tile, Smem& smem,
                          Ring<Plan::kRowSlots> rows) {
  bool any = false;
#pragma unroll 1
  for (int w = 0; w < Plan::kWarpgroups; ++w) {
    const Ring<Plan::kRowSlots> place = {rows.position + w};
    smem.row_full[place.slot()].wait(place.parity());
  }
#pragma unroll 1
  for (int row = lane_of_team() % 32; row < Plan::kWarpgroups * kRows; row += 32) {
    int token[Plan::kRank];
    const bool exists = token_of_row<Plan>(smem.problem, tile, row / kRows, row % kRows, token);
    const bool is_hidden = exists && mask.hides(tile.batch, token);
    const unsigned hidden = __ballot_sync(0xffffffffu, is_hidden);
    any |= hidden != 0;
    if ((row ^ lane_of_team()) & 32) continue;  // the other warp sets it to zero
    if (row % 32 == 0) smem.mask.hidden[Ring<2>{tile.position}.slot()].bits[row / 32] = hidden;
    const Ring<Plan::kRowSlots> place = {rows.position + row / kRows};
    if (is_hidden) clear(smem.row[place.slot()], row % kRows);
  }
  fence_shared();
  if (!any) return;
#pragma unroll 1
  for (int r = 0; r < Plan::kRank; ++r) smem.mask.windows[r][lane_of_team()].all = {0, 0};
}

// Whether the mask shows any of the keys that are the rows of warpgroup `w`; `at` is where the mask
// is for the tokens that are chosen along the axes before kAxis.
template <typename Plan, int kAxis = 0>
__device__ bool any_row_is_seen(const HopperProblem<Plan::kRank>& problem,
                                const HiddenKeys<Plan>& mask, const Tile<Plan::kRank>& tile, int w,
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

// What a lane of the warps that make masks does to a box of columns of which some are hidden, when
// that has come: it sets its columns that are hidden to zero, and tells consumers that vo is there.
// Two warps share those of each lane.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct Cleaner {
  template <typename Smem>
  __device__ void clean(Smem&, Ring<Plan::kStages>, int) {}
  __device__ void expect(const QuadWords&, int) {}
};
template <typename Plan>
struct Cleaner<Plan, true> {
  static constexpr unsigned kExpected = 16;
  unsigned hidden = 0;  // bit q stands for the lane's column of quad q, if the box before has some
  unsigned parity = 0;  // bit s is that of the next phase of `vo_came` of stage s

  __device__ void expect(const QuadWords& seen, int lane) {
    hidden = kExpected;
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) hidden |= (~seen.word[quad] >> lane % 32 & 1) << quad;
  }

  // `next` is the place of the current box.
  template <typename Smem>
  __device__ void clean(Smem& smem, Ring<Plan::kStages> next, int lane) {
    if (hidden == 0) return;
    const Ring<Plan::kStages> box = next.before();
    const unsigned stage = box.slot();
    // Parities say which phase: this warp arrives at every one of `qk_full`, and awaits all of
    // `vo_came`
    if constexpr (Plan::kBackward) smem.qk_full[stage].wait(box.parity());
    smem.vo_came(stage).wait(parity >> stage & 1);
    parity ^= 1 << stage;
#pragma unroll 1
    for (int quad = lane / 32; quad < 4; quad += 2) {
      const int column = lane % 32 / 2 * 8 + 2 * quad + lane % 2;
      if (!(hidden >> quad & 1)) continue;
      clear(smem.column_vo[stage], column);
      if constexpr (Plan::kBackward) clear(smem.column_qk[stage], column);
    }
    fence_shared();
    smem.vo_full[stage].arrive_as_warp();
    hidden = 0;
  }
};

}  // namespace cuneigh::hopper
