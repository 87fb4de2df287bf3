// Brings the rows of tiles of queries back to their tokens: outputs, or gradients of queries. Every
// query lies in exactly one box.
//
// blockIdx.x: (tile, slice of its matrix). Plan: kVector elements move together.

#include "cuneigh/gemm.cuh"

namespace cuneigh {

template <typename Plan>
struct UnpackArguments {
  MutableView<Plan> target;
  const typename Plan::Element* source;  // [tiles, rows, dim]
  long long dim;
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    gemm_unpack(const Tiles<Plan::kRank> tiles, const UnpackArguments<Plan> arguments) {
  using Move = Packet<typename Plan::Element, Plan::kVector>;
  constexpr int kRank = Plan::kRank;

  const Problem<kRank>& problem = tiles.problem;
  const unsigned slices = arguments.slices;
  const unsigned tile_index = blockIdx.x / slices;
  const Tile<kRank> tile(tiles, tiles.first + tile_index);
  const unsigned places = volume(problem.box);
  const unsigned rows = places * problem.group_size;
  const unsigned packets = unsigned(arguments.dim) / Plan::kVector;  // of a row
  const Move* source =
      reinterpret_cast<const Move*>(arguments.source) + (long long)tile_index * rows * packets;

  for (unsigned i = blockIdx.x % slices * Plan::kThreads + threadIdx.x; i < rows * packets;
       i += slices * Plan::kThreads) {
    const unsigned row = i / packets;
    const unsigned element = i % packets * Plan::kVector;
    const Coordinates<kRank> place(row % places, problem.box);
    int token[kRank];
    bool exists = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int group = tile.first[r].group;
      const int index = tile.first[r].index + place.at[r];
      exists &= index < axis.group_length(group);
      token[r] = axis.token({group, index});
    }
    const int head = tile.kv_head * problem.group_size + row / places;
    if (exists)
      *reinterpret_cast<Move*>(arguments.target.at(tile.batch, token, head) + element) = source[i];
  }
}

}  // namespace cuneigh
