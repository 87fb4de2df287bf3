// Addresses of the matrices of every tile of a chunk, for products that read tokens where they are:
// where boxes and halos are whole along all axes but the first, one stride leads from token to
// token.
//
// One thread for each tile; blockIdx.y: the matrix. Plan: kRank, kThreads, kMost (matrices).

#include "gemm/tiles.cuh"

namespace cuneigh::gemm {

// The matrices of one kind: tokens where they are, or tiles one after another. Strides are in
// bytes.
struct Located {
  long long data;
  long long batch, token, head;  // of tokens; `token` along the first axis
  long long tile;                // from tile to tile
  long long is_halo;
};
static_assert(sizeof(Located) == 48, "cuneigh/_backends/gemm/walk.py packs six words");

template <typename Plan>
struct AddressArguments {
  Located located[Plan::kMost];
  long long* addresses;  // [matrices, tiles]
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    addresses(const Tiles<Plan::kRank> tiles, const AddressArguments<Plan> arguments) {
  const long long i = blockIdx.x * (long long)Plan::kThreads + threadIdx.x;
  if (i >= tiles.count) return;
  const Tile<Plan::kRank> tile(tiles, tiles.first + i);
  const Located& located = arguments.located[blockIdx.y];
  const int index = located.is_halo ? tile.halo[0] : tile.first[0].index;
  const int token = tiles.problem.axes[0].token({tile.first[0].group, index});
  arguments.addresses[blockIdx.y * tiles.count + i] =
      located.data + tile.batch * located.batch + token * located.token +
      tile.kv_head * located.head + i * located.tile;
}

}  // namespace cuneigh::gemm
