// Which pairs of a tile's rows and a box of columns are visible, where shared memory is short
// (sums.cuh). Along the only axis a row sees one range of the columns of a box. That takes 2 bytes
// where words (mask.cuh) take 16; consumers make the words.
#pragma once

#include "hopper/mask.cuh"

namespace cuneigh::hopper {

// Columns of a box, at most 255: those that a row sees.
struct ColumnRange {
  unsigned char begin, end;
};

template <typename Plan>
struct RangeTables {
  static constexpr int kTileRows = Plan::kWarpgroups * kRows;

  ColumnRange range[Plan::kStages][kTileRows];
  // Of a tile: the columns that all rows of a warpgroup see, and a bit for each row that is hidden
  Range seen_by_all[Plan::kWarpgroups];
  unsigned hidden[kTileRows / 32];

  __device__ bool hides(int row) const { return hidden[row / 32] >> row % 32 & 1; }

  // The columns of a box that a row of warpgroup `w` sees, of those that lanes `quad` hold.
  __device__ unsigned word(const HopperProblem<1>&, unsigned stage, int w, int row,
                           int quad) const {
    const ColumnRange seen = range[stage][w * kRows + row];
    return first_columns(seen.end, quad) & ~first_columns(seen.begin, quad);
  }
};

template <typename Plan>
__device__ void fill_mask_tables(const HopperProblem<1>&, RangeTables<Plan>&) {}

// Looks at the rows of a tile, by all lanes of a warp. The logits of rows past the end of the keys,
// and of keys that `mask` hides, must be hidden, since they count in sums of columns. Returns
// whether there are any of the latter.
template <typename Plan, int kLanes>
__device__ bool look_up(const HopperProblem<1>& problem, const HiddenKeys<Plan>& mask,
                        const Tile<1>& tile, RangeTables<Plan>& tables) {
  static_assert(kLanes == 32);
  const Axis axis = axis_of<Plan>(problem, 0);
  const int first = tile.first[0].index, base = tile.columns[0].begin;
  const int keys = rows_of_group<Plan>(axis, 0);
  bool hides = false;
  if constexpr (Plan::kKeyMask) {
#pragma unroll 1
    for (int row = lane_of_team(); row < tables.kTileRows; row += kLanes) {
      const bool is_hidden = first + row < keys && mask.hides(tile.batch, {first + row});
      const unsigned hidden = __ballot_sync(0xffffffffu, is_hidden);
      if (lane_of_team() == 0) tables.hidden[row / 32] = hidden;
      hides |= hidden != 0;
    }
  }
  const int w = lane_of_team();
  if (w < Plan::kWarpgroups) {
    const int begin = first + w * kRows, last = begin + kRows - 1;
    Range seen = {0, 0};
    if (!hides && last < keys)
      seen = {window_of<Plan>(axis, last, 0).begin - base,
              window_of<Plan>(axis, begin, 0).end - base};
    tables.seen_by_all[w] = seen;
  }
  __syncwarp();
  return hides;
}

// No box is passed over: all warpgroups multiply by the dS of all.
template <typename Plan>
__device__ Visibility visibility_of(const HopperProblem<1>&, const RangeTables<Plan>& tables,
                                    int lane, const int (&first)[1]) {
  const Range seen = tables.seen_by_all[smaller(lane, Plan::kWarpgroups - 1)];
  return seen.begin <= first[0] && first[0] + Plan::kColumns <= seen.end ? kAll : kPartial;
}

// Finds the ranges of the lane's rows in the box of columns that begins at `first`.
template <int kLanes, typename Plan>
__device__ void mark_visible(const HopperProblem<1>& problem, const Tile<1>& tile,
                             RangeTables<Plan>& tables, unsigned stage, int lane,
                             const int (&first)[1]) {
  const Axis axis = axis_of<Plan>(problem, 0);
  const int begin = tile.columns[0].begin + first[0];
  const auto clip = [&](int column) {
    return static_cast<unsigned char>(smaller(larger(column - begin, 0), Plan::kColumns));
  };
#pragma unroll 1
  for (int row = lane; row < tables.kTileRows; row += kLanes) {
    const int index = tile.first[0].index + row;
    Range window = {0, 0};
    bool exists = index < rows_of_group<Plan>(axis, 0);
    if constexpr (Plan::kKeyMask) exists &= !tables.hides(row);
    if (exists) window = window_of<Plan>(axis, index, 0);
    tables.range[stage][row] = {clip(window.begin), clip(window.end)};
  }
}

template <typename Plan, bool kSums = Plan::kSums>
struct Masks : MaskTables<Plan> {};
template <typename Plan>
struct Masks<Plan, true> : RangeTables<Plan> {};

}  // namespace cuneigh::hopper
