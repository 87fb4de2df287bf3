// The tiles of a block: which columns of each stage every warp takes, and where it reads them.
#pragma once

#include "fused/small/stages.cuh"
#include "fused/small/tables.cuh"

namespace cuneigh::fused::small {

// The bits that a lane has of the first `count` columns of a tile.
template <typename Plan>
__device__ LaneBits<Plan> bits_below(int count, int lane) {
  constexpr int kBits = 8 * sizeof(LaneBits<Plan>);
  const int mine = count / 8 * 2 + smaller(larger(count % 8 - lane % 4 * 2, 0), 2);
  return mine == 0 ? 0 : ~LaneBits<Plan>() >> (kBits - mine);
}

// Fills the tiles of every stage: where a warp's tile begins, and what is visible of it.
template <typename Plan, typename Smem>
__device__ void fill_tiles(const SmallWindowProblem<Plan::kRank>& problem, int warp, int lane,
                           Smem& smem) {
  const auto& tables = smem.tables;
  const int inner = inner_columns(problem);
#pragma unroll 1
  for (int stage = 0; stage < tables.stages; ++stage) {
    bool any = true;
    int first = 0, phase = 0, pitch = kColumnBytes<Plan>, tile_pitch = 1;
    int starts[Plan::kRank];  // the first column of the tile, in the stage
    LaneMasks<Plan> visible = {{~LaneBits<Plan>(), ~LaneBits<Plan>()}};
    int table = 0;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const int size = problem.stage[r], tile = problem.tile[r];
      // Along the first axis columns before `new_begin` were in the stage before
      int base = tables.block_union[r].begin, new_begin = base, new_end = tables.block_union[r].end;
      if (r == 0) {
        new_begin = base + stage * size;
        new_end = new_begin + size;
        base += stage_begin(problem, tables, stage);
      }
      const Range range = tables.warp_union[warp][r];
      const int begin = larger(range.begin, new_begin);
      any &= begin < smaller(range.end, new_end);
      const int start = smaller(begin - base, size - tile);
      starts[r] = start;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Range window = tables.window[warp * 16 + half * 8 + lane / 4][r];
        const int origin = base + start;
        const int low = smaller(larger(larger(window.begin, new_begin) - origin, 0), tile);
        const int high = smaller(larger(window.end - origin, 0), tile);
        visible.row[half] &=
            r == 0 ? bits_below<Plan>(high * inner, lane) & ~bits_below<Plan>(low * inner, lane)
                   : tables.prefix_mask[table + high][lane % 4] &
                         ~tables.prefix_mask[table + low][lane % 4];
      }
      if (r > 0) table += tile + 1;
    }
    smem.visible(stage, warp, lane) = visible;
#pragma unroll
    for (int r = Plan::kRank - 1; r >= 0; --r) {
      first += starts[r] * pitch;
      phase += starts[r] * tile_pitch;
      pitch *= problem.stage[r];
      tile_pitch *= problem.tile[r];
    }
    first = kByTma ? first / kColumnBytes<Plan> : first + phase % 8 * 16;
    if (lane == 0) smem.tile(stage, warp) = Plan::kOneStage || any ? first : kNoTile;
  }
}

// Where a lane reads a warp's tile for ldmatrix, sixteen columns at a time. `first` is what
// SmallSmem::tile says. `chunk_address` takes these addresses and adds dimensions.
template <typename Plan>
struct TileAddresses {
  unsigned nt_first, nn_first;
  const int *nt_offset, *nn_offset, *pair_offset;

  // tile_offset: [kColumns], that of SmallTables.
  __device__ TileAddresses(unsigned stage, unsigned first, const int* tile_offset, int lane)
      : nt_offset(&tile_offset[lane / 16 * 8 + lane % 8]),
        nn_offset(&tile_offset[lane % 16]),
        pair_offset(&tile_offset[lane % 4 * 2]) {
    const unsigned column = stage + (kByTma ? first * kColumnBytes<Plan> : first & ~127u);
    unsigned phase = ((kByTma ? first : first / 16) + lane) % 8;
    if (kByTma && Plan::kHeadDim == 32) phase /= 2;
    nt_first = column + (phase ^ lane / 8 % 2) * 16;
    nn_first = column + (phase ^ lane / 16) * 16;
  }
  // From column n on two matrices [8 columns, 16 dimensions]: right operands of S = Q K^T.
  __device__ unsigned nt(int n) const { return nt_first + nt_offset[n]; }
  // From column n on two matrices [16 columns, 8 dimensions]: right operands of O += P V.
  __device__ unsigned nn(int n) const { return nn_first + nn_offset[n]; }
  // Offsets of the lane's two of the eight columns from column n on.
  __device__ uint2 pair(int n) const { return *reinterpret_cast<const uint2*>(&pair_offset[n]); }
};

// Likewise of a tile whose columns follow each other in the stage, too, which TMA brings.
template <typename Plan>
struct ContiguousTile {
  unsigned nt_first, nn_first;

  __device__ ContiguousTile(unsigned stage, unsigned first, int lane) {
    unsigned phase = (first + lane) % 8;
    if (Plan::kHeadDim == 32) phase /= 2;
    nt_first = stage + (first + lane / 16 * 8 + lane % 8) * kColumnBytes<Plan> +
               (phase ^ lane / 8 % 2) * 16;
    nn_first = stage + (first + lane % 16) * kColumnBytes<Plan> + (phase ^ lane / 16) * 16;
  }
  __device__ unsigned nt(int n) const { return nt_first + n * kColumnBytes<Plan>; }
  __device__ unsigned nn(int n) const { return nn_first + n * kColumnBytes<Plan>; }
};

}  // namespace cuneigh::fused::small
