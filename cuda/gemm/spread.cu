// Spreads the slots of every query over the columns of its tile: dense weights (or gradients of
// logits) with zeros for keys that a row does not see. Hidden slots are never read.
//
// blockIdx.x: a tile and a slice of its rows. A team of Plan::kLanes lanes takes a row.

#include "gemm/rows.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct SpreadArguments {
  ConstView<Plan> slots;             // [batch, x1..xr, heads, slots]
  typename Plan::Element* products;  // [tiles, rows, columns]
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    spread(const Tiles<Plan::kRank> tiles, const SpreadArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  constexpr int kRank = Plan::kRank;

  const Problem<kRank>& problem = tiles.problem;
  const int keys = volume(tiles.halo);
  const Extents<kRank> halo(tiles.halo);
  int window_size = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) window_size *= problem.axes[r].kernel_size;

  for_each_row<Plan>(
      tiles, arguments.slices,
      [&](const Tile<kRank>& tile, const TileRow<kRank>& row, long long start) {
        const Element* slots =
            row.exists ? arguments.slots.at(tile.batch, row.token, row.head) : nullptr;
        for (int column = Group<Plan::kLanes>::lane(); column < tiles.columns;
             column += Plan::kLanes) {
          int slot = column - keys + window_size;
          bool seen = row.exists && column < keys + problem.additional;
          if (seen && column < keys) {
            const Coordinates<kRank> key(column, halo);
            seen = row.sees(key);
            slot = 0;
#pragma unroll
            for (int r = 0; r < kRank; ++r)
              slot = slot * problem.axes[r].kernel_size + key.at[r] - row.span[r].begin;
          }
          arguments.products[start + column] =
              seen ? slots[slot * arguments.slots.inner] : convert<Element>(Number(0));
        }
      });
}

}  // namespace cuneigh::gemm
