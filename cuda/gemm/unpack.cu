// Brings the rows of tiles of queries back to their tokens: outputs, or gradients of queries. Every
// query lies in exactly one box.
//
// blockIdx.x: a tile and a slice of its matrix. Plan: kVector elements move together.

#include "gemm/tiles.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct UnpackArguments {
  MutableView<Plan> target;              // [batch, x1..xr, heads, dim]
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
  const unsigned tokens_of_box = volume(problem.box);
  const unsigned rows = tokens_of_box * problem.group_size;
  const Divisor packets(unsigned(arguments.dim) / Plan::kVector);  // of a row
  const Divisor queries(tokens_of_box);
  const Extents<kRank> box(problem.box);
  const Move* source = reinterpret_cast<const Move*>(arguments.source) +
                       (long long)tile_index * rows * packets.value;

  for (unsigned i = blockIdx.x % slices * Plan::kThreads + threadIdx.x; i < rows * packets.value;
       i += slices * Plan::kThreads) {
    unsigned row = i;
    const int element = packets.divide(row) * Plan::kVector;
    unsigned in_group = row;  // becomes the query head
    const Coordinates<kRank> inside(queries.divide(in_group), box);
    int token[kRank];
    const bool exists = tokens.find(inside.at, token);
    const int head = tile.kv_head * problem.group_size + in_group;
    if (exists)
      *reinterpret_cast<Move*>(arguments.target.at(tile.batch, token, head) + element) = source[i];
  }
}

}  // namespace cuneigh::gemm
