// Brings the rows of tiles of queries back to their tokens: outputs, or gradients of queries. Every
// query lies in exactly one box.
//
// blockIdx.x: (tile, slice of its matrix). Plan: kVector elements move together.

#include "gemm/gemm.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct UnpackArguments {
  MutableView<Plan> target;
  const typename Plan::Element* source;  // [tiles, rows, dim]
  long long dim;
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    unpack(const Tiles<Plan::kRank> tiles, const UnpackArguments<Plan> arguments) {
  using Move = Packet<typename Plan::Element, Plan::kVector>;
  constexpr int kRank = Plan::kRank;

  const Problem<kRank>& problem = tiles.problem;
  const unsigned slices = arguments.slices;
  const unsigned tile_index = blockIdx.x / slices;
  const Tile<kRank> tile(tiles, tiles.first + tile_index);
  const auto tokens = TileTokens<kRank>::template of<false>(tiles, tile);
  const unsigned places = volume(problem.box);
  const unsigned rows = places * problem.group_size;
  const Divisor packets(unsigned(arguments.dim) / Plan::kVector);  // of a row
  const Divisor queries(places);
  const Extents<kRank> box(problem.box);
  const Move* source = reinterpret_cast<const Move*>(arguments.source) +
                       (long long)tile_index * rows * packets.value;

  for (unsigned i = blockIdx.x % slices * Plan::kThreads + threadIdx.x; i < rows * packets.value;
       i += slices * Plan::kThreads) {
    unsigned row = i;
    const int element = packets.divide(row) * Plan::kVector;
    unsigned member = row;  // of the head group
    const Coordinates<kRank> place(queries.divide(member), box);
    int token[kRank];
    const bool exists = tokens.find(place.at, token);
    const int head = tile.kv_head * problem.group_size + member;
    if (exists)
      *reinterpret_cast<Move*>(arguments.target.at(tile.batch, token, head) + element) = source[i];
  }
}

}  // namespace cuneigh::gemm
