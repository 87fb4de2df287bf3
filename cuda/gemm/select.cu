// Selects the slots of every query out of the dense products of tiles: logits from the products of
// queries and keys, or gradients of weights from those of gradients of outputs and values.
//
// blockIdx.x: a tile and a slice of its rows. A team of Plan::kLanes lanes takes a row.
// Plan::kHiddenIsZero: whether the slot of a hidden key, past a causal end, gets 0 (as gradients
// do) or -inf (as logits do).

#include "gemm/rows.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct SelectArguments {
  BiasView<Plan> rpb;                                   // [heads, 2 K - 1, ..], or null
  MutableView<Plan> slots;                              // [batch, x1..xr, heads, slots]
  const Accumulator<typename Plan::Element>* products;  // [tiles, rows, columns]
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    select(const Tiles<Plan::kRank> tiles, const SelectArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  constexpr int kRank = Plan::kRank;

  const Problem<kRank>& problem = tiles.problem;
  const int keys = volume(tiles.halo);
  int window[kRank];
#pragma unroll
  for (int r = 0; r < kRank; ++r) window[r] = problem.axes[r].kernel_size;
  const int window_size = volume(window);
  const Extents<kRank> extents(window);

  for_each_row<Plan>(tiles, arguments.slices,
                     [&](const Tile<kRank>& tile, const TileRow<kRank>& row, long long start) {
                       if (!row.exists) return;
                       Element* slots = arguments.slots.at(tile.batch, row.token, row.head);
                       for (int slot = Group<Plan::kLanes>::lane();
                            slot < window_size + problem.additional; slot += Plan::kLanes) {
                         int column = keys + slot - window_size;
                         bool seen = true;
                         Number bias = 0;
                         if (slot < window_size) {
                           const Coordinates<kRank> offset(slot, extents);
                           int index[kRank];
                           column = 0;
#pragma unroll
                           for (int r = 0; r < kRank; ++r) {
                             const int at = row.span[r].begin + offset.at[r];
                             seen &= offset.at[r] < row.span[r].count;
                             column = column * tiles.halo[r] + at;
                             index[r] = row.span[r].bias + at;
                           }
                           if constexpr (!kSame<typename Plan::Bias, void>)
                             bias = convert<Number>(*arguments.rpb.at(0, index, row.head));
                         }
                         Number selected = Plan::kHiddenIsZero ? Number(0) : -infinity<Number>();
                         // S = scale Q K^T + bias, or dP = dO V^T
                         if (seen)
                           selected =
                               Number(problem.scale) * arguments.products[start + column] + bias;
                         slots[slot * arguments.slots.inner] = convert<Element>(selected);
                       }
                     });
}

}  // namespace cuneigh::gemm
