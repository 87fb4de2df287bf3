// Gathers the rows of tiles into dense matrices: keys (or values) of the halos, additional ones
// after them, or queries (or gradients of outputs) of the boxes. Rows that stand for no token are
// zeros.
//
// blockIdx.x: a tile and a slice of its matrix. Plan: kKeys says which of the two, kVector how many
// elements move together.

#include "gemm/tiles.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct PackArguments {
  ConstView<Plan> source;          // [batch, x1..xr, heads, dim]
  ConstView<Plan> additional;      // [batch, n, kv_heads, dim], or null
  typename Plan::Element* target;  // [tiles, rows, dim]
  long long dim;
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    pack(const Tiles<Plan::kRank> tiles, const PackArguments<Plan> arguments) {
  using Move = Packet<typename Plan::Element, Plan::kVector>;
  constexpr int kRank = Plan::kRank;

  const Problem<kRank>& problem = tiles.problem;
  const unsigned slices = arguments.slices;
  const unsigned tile_index = blockIdx.x / slices;
  const Tile<kRank> tile(tiles, tiles.first + tile_index);
  const auto tokens = TileTokens<kRank>::template of<Plan::kKeys>(tiles, tile);
  const unsigned tokens_of_box = Plan::kKeys ? volume(tiles.halo) : volume(problem.box);
  const unsigned rows = Plan::kKeys ? tiles.columns : tokens_of_box * problem.group_size;
  const Divisor packets(unsigned(arguments.dim) / Plan::kVector);  // of a row
  const Extents<kRank> extents(Plan::kKeys ? tiles.halo : problem.box);
  const Divisor queries(tokens_of_box);
  Move* target =
      reinterpret_cast<Move*>(arguments.target) + (long long)tile_index * rows * packets.value;

  for (unsigned i = blockIdx.x % slices * Plan::kThreads + threadIdx.x; i < rows * packets.value;
       i += slices * Plan::kThreads) {
    unsigned row = i;
    const int element = packets.divide(row) * Plan::kVector;
    const typename Plan::Element* source = nullptr;
    if (!Plan::kKeys || row < tokens_of_box) {
      unsigned in_group = row;  // becomes the query head
      const Coordinates<kRank> inside(Plan::kKeys ? row : queries.divide(in_group), extents);
      int token[kRank];
      const bool exists = tokens.find(inside.at, token);
      const int head = Plan::kKeys ? tile.kv_head : tile.kv_head * problem.group_size + in_group;
      if (exists) source = arguments.source.at(tile.batch, token, head);
    } else if (row < tokens_of_box + problem.additional) {
      source = arguments.additional.at(tile.batch, tile.kv_head) +
               (row - tokens_of_box) * arguments.additional.token[0];
    }
    Move packet;
    if (source) {
      packet = *reinterpret_cast<const Move*>(source + element);
    } else {
#pragma unroll
      for (int e = 0; e < Plan::kVector; ++e)
        packet.element[e] = convert<typename Plan::Element>(Accumulator<typename Plan::Element>(0));
    }
    target[i] = packet;
  }
}

}  // namespace cuneigh::gemm
