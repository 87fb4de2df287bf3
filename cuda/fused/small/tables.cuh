// Filling the tables of a block that are not about the tiles of its stages.
#pragma once

#include "fused/small/smem.cuh"

namespace cuneigh::fused::small {

// Columns of a tile that have the same coordinate along the first axis.
template <int kRank>
__device__ int inner_columns(const SmallWindowProblem<kRank>& problem) {
  int inner = 1;
#pragma unroll
  for (int r = 1; r < kRank; ++r) inner *= problem.tile[r];
  return inner;
}

// Finds the window union of a block's rows, and how many stages it is cut into.
template <typename Plan>
__device__ void fill_block_union(const SmallWindowProblem<Plan::kRank>& problem,
                                 const RowBox<Plan::kRank>& rows, SmallTables<Plan>& tables) {
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    if (threadIdx.x != Plan::kWarps * 32 - 32 * (r + 1))
      continue;  // warps that mostly have no rows
    const Range range = union_of_block<Plan>(problem.axes[r], rows.first[r],
                                             problem.warp_box[r] * problem.warps[r]);
    tables.block_union[r] = range;
    if constexpr (Axis::kIsPart)  // an empty union still begins with a column
      if (range.begin == range.end) {
        const int columns = columns_of_group<Plan>(problem.axes[r], rows.first[r].group);
        const int begin = smaller(range.begin, larger(columns - 1, 0));
        tables.block_union[r] = {begin, begin};
      }
    if (r == 0)
      tables.stages = Plan::kOneStage ? 1 : ceil_div(range.end - range.begin, problem.stage[0]);
  }
}

// Fills `warp_union`, `window` and `exists` for a row; every warp takes a box of its own. Calls
// keep(row, token) with a valid token also where there is no row. All lanes of a warp must call it.
template <typename Plan, typename Keep>
__device__ void fill_row(const SmallWindowProblem<Plan::kRank>& problem,
                         const RowBox<Plan::kRank>& rows, int row, SmallTables<Plan>& tables,
                         Keep keep) {
  constexpr int kRank = Plan::kRank;
  int in_warp = row % 16, warp = row / 16, index[kRank], token[kRank];
  bool exists = true;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const FastDivmod box = problem.warp_box[r], warps = problem.warps[r];
    const int inside = r == 0 ? in_warp : box.remainder(in_warp);
    const int length = rows_of_group<Plan>(problem.axes[r], rows.first[r].group);
    index[r] = rows.first[r].index + (r == 0 ? warp : warps.remainder(warp)) * box + inside;
    exists &= inside < box && index[r] < length;
    index[r] = smaller(index[r], length - 1);
    in_warp = box.quotient(in_warp);
    warp = warps.quotient(warp);
  }
  tables.exists[row] = exists;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const Axis& axis = problem.axes[r];
    const int group = rows.first[r].group;
    const Range window = window_of_row<Plan>(axis, index[r], group);
    token[r] = axis.token({group, index[r]});
    tables.window[row][r] = exists ? window : Range{0, 0};
    int begin = exists ? window.begin : 1 << 30, end = exists ? window.end : 0;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      begin = smaller(begin, __shfl_xor_sync(0xffffffffu, begin, step));
      end = larger(end, __shfl_xor_sync(0xffffffffu, end, step));
    }
    tables.warp_union[row / 16][r] = {begin, end};
  }
  keep(row, token);
}

// Fills `tile_offset` and `prefix_mask`. The columns of a tile come in raster order.
template <typename Plan, int kWarps = Plan::kWarps>
__device__ void fill_tile_tables(const SmallWindowProblem<Plan::kRank>& problem,
                                 SmallTables<Plan>& tables) {
  constexpr int kRank = Plan::kRank;
  const int lane = threadIdx.x % 32;
  const int area = problem.tile[0] * inner_columns(problem);
#pragma unroll 1
  for (int column = threadIdx.x; column < Plan::kColumns; column += kWarps * 32) {
    int rest = column < area ? column : column % 8, bytes = 0, pitch = kColumnBytes<Plan>;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const FastDivmod tile = problem.tile[r];
      bytes += (r == 0 ? rest : tile.remainder(rest)) * pitch;
      rest = tile.quotient(rest);
      pitch *= problem.stage[r];
    }
    tables.tile_offset[column] = bytes;
  }

  // A ballot gathers the bits of one lane, of 128 columns
  constexpr int kBallots = sizeof(LaneBits<Plan>) / sizeof(unsigned);
  int first = 0;
#pragma unroll
  for (int r = 1; r < kRank; ++r) {
    const FastDivmod size = problem.tile[r];
    int coordinate[4 * kBallots];
#pragma unroll
    for (int i = 0; i < 4 * kBallots; ++i) {
      const int column = i / 4 * 128 + lane / 2 * 8 + i % 4 * 2 + lane % 2;
      int rest = column;
#pragma unroll
      for (int inner = kRank - 1; inner > r; --inner) rest = problem.tile[inner].quotient(rest);
      coordinate[i] = column < area ? size.remainder(rest) : size;
    }
#pragma unroll 1
    for (int index = threadIdx.x / 32; index <= size; index += kWarps)
#pragma unroll
      for (int i = 0; i < 4 * kBallots; ++i) {
        const unsigned bits = __ballot_sync(0xffffffffu, coordinate[i] < index);
        auto* words = reinterpret_cast<unsigned*>(&tables.prefix_mask[first + index][i % 4]);
        if (lane == 0) words[i / 4] = bits;
      }
    first += size + 1;
  }
}

// Fills `rows`, `block_union`, `warp_union`, `window`, `exists`, `tile_offset`, `prefix_mask` and
// the sizes of stages. Calls keep(row, token) as `fill_row` does.
template <typename Plan, typename Keep>
__device__ void fill_row_tables(const SmallWindowProblem<Plan::kRank>& problem,
                                SmallTables<Plan>& tables, Keep keep) {
  const RowBox<Plan::kRank> rows = row_box<Plan>(problem);
  fill_block_union<Plan>(problem, rows, tables);
  if (threadIdx.x < SmallTables<Plan>::kRows)
    fill_row<Plan>(problem, rows, threadIdx.x, tables, keep);
  if (threadIdx.x == 0) {
    int columns = 1;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) columns *= problem.stage[r];
    tables.rows = rows;
    tables.stage_columns = columns;
    tables.stage_bytes = kByTma ? 2 * problem.vo_offset : columns * kColumnBytes<Plan>;
  }
  fill_tile_tables<Plan>(problem, tables);
}

// The origin of an array of the columns: the first column of the block.
template <typename Plan, typename Element>
__device__ Origin<Element> origin_of_columns(const SmallWindowProblem<Plan::kRank>& problem,
                                             const View<Element, Plan::kRank>& view,
                                             const SmallTables<Plan>& tables) {
  const auto& rows = tables.rows;
  const int head =
      Plan::kRowsAreKeys ? rows.head * problem.group_size : rows.head / problem.group_size;
  Element* data = view.at(0, head);
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) {
    const Axis& axis = problem.axes[r];
    const int group = column_group<Plan>(axis, rows.first[r].group);
    int token = axis.token({group, tables.block_union[r].begin});
    if (Axis::kIsPart)  // of a group without columns, too, something is read
      token = smaller(token, (Plan::kRowsAreKeys ? axis.length : axis.key_length) - 1);
    data += token * view.token[r];
  }
  return {data, unsigned(view.batch / kUnit<Element>), unsigned(view.head / kUnit<Element>),
          unsigned(problem.axes[0].dilation * view.token[0] / kUnit<Element>)};
}

// Fills `qk`, `vo`, `extra` and the offsets of a stage's columns, as far as they are needed.
// Columns of a stage that lie past the block's window union repeat its last ones.
template <typename Plan, int kRowDim, typename Vectors, typename Extras>
__device__ void fill_column_tables(const SmallWindowProblem<Plan::kRank>& problem,
                                   const Vectors& qk, const Vectors& vo, const Extras& extra,
                                   SmallSmem<Plan, kRowDim>& smem) {
  constexpr int kRank = Plan::kRank;
  auto& tables = smem.tables;
  constexpr bool kExtra = Plan::kRowsAreKeys || kMaskedColumns<Plan>;
  if constexpr (kExtra)
    if (threadIdx.x == 64) tables.extra = origin_of_columns<Plan>(problem, extra, tables);
  if (kByTma && !Plan::kRowsAreKeys) return;
  if (threadIdx.x == 0) tables.qk = origin_of_columns<Plan>(problem, qk, tables);
  if (threadIdx.x == 32) tables.vo = origin_of_columns<Plan>(problem, vo, tables);
#pragma unroll 1
  for (int i = threadIdx.x; i < tables.stage_columns; i += Plan::kWarps * 32) {
    int rest = i, tokens[kRank], phase = 0, pitch = 1;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const FastDivmod size = problem.stage[r];
      const Range range = tables.block_union[r];
      const int coordinate = r == 0 ? rest : size.remainder(rest);
      phase += coordinate * pitch;
      pitch *= problem.tile[r];
      int last = range.end - 1 - range.begin;
      if (Axis::kIsPart) last = larger(last, 0);
      tokens[r] = smaller(coordinate, last) * problem.axes[r].dilation;
      rest = size.quotient(rest);
    }
    if (kByTma) {
      smem.extra_offset(i) = offset_of(extra, tokens);
      continue;
    }
    smem.column_offsets()[i] = {unsigned(i * kColumnBytes<Plan> + phase % 8 * 16),
                                offset_of(qk, tokens), offset_of(vo, tokens),
                                kExtra ? offset_of(extra, tokens) : 0};
  }
}

}  // namespace cuneigh::fused::small
