// Looks which keys a mask shows, for a kernel in which columns are keys: `SeenBoxes` of seen.cuh. A
// block takes the tiles of all heads at a place, a warp one box of columns after another.
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/seen.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct SeenArguments {
  View<const bool, Plan::kRank> key_mask;
  QuadWords* boxes;
  long long most_boxes;
};

// The first one of the tiles at a place, `place` counting those of all batch entries.
template <int kRank>
__device__ int tile_at(const HopperProblem<kRank>& problem, int place) {
  int tiles = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) tiles *= problem.tiles[r].divisor;
  const int batch = place / tiles;
  int tile = batch * tiles * problem.head_groups.divisor + place % tiles;
  if (problem.longest_last) tile = problem.tile_count - 1 - tile;
  const int divided = larger(tile - problem.whole_tiles, 0);
  return tile + divided * (int(problem.parts.divisor) - 1);
}

template <typename Plan>
__global__ void __launch_bounds__(256)
    seen(const HopperProblem<Plan::kRank> problem, const SeenArguments<Plan> arguments) {
  constexpr int kRank = Plan::kRank;
  static_assert(!Plan::kRowsAreKeys && !Plan::kSums, "boxes of a tile come in raster order");
  __shared__ Tile<kRank> tile;
  __shared__ int number;
  if (threadIdx.x == 0) number = find_tile<Plan>(problem, tile_at(problem, blockIdx.x), tile);
  __syncthreads();

  // A lane looks after the columns 8 (lane / 2) + 2 quad + lane % 2, for which its bit stands
  const int lane = threadIdx.x % 32;
  int count[kRank], boxes = 1, group[kRank], inside[4][kRank];
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    count[r] = ceil_div(tile.columns[r].end - tile.columns[r].begin, problem.column_box[r]);
    boxes *= count[r];
    group[r] = column_group<Plan>(problem, tile, r);
  }
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    int column = lane / 2 * 8 + 2 * quad + lane % 2;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      inside[quad][r] = column % problem.column_box[r];
      column /= problem.column_box[r];
    }
  }
#pragma unroll 1
  for (int box = threadIdx.x / 32; box < boxes; box += 8) {
    int first[kRank], rest = box;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      first[r] = tile.columns[r].begin + rest % count[r] * problem.column_box[r];
      rest /= count[r];
    }
    QuadWords words;
    bool any = false;
#pragma unroll
    for (int quad = 0; quad < 4; ++quad) {
      int token[kRank];
      bool given = lane < Plan::kColumns / 4;
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        const Axis axis = axis_of<Plan>(problem, r);
        token[r] = axis.token({group[r], first[r] + inside[quad][r]});
        given &= token[r] < axis.key_length;
      }
      const bool is_seen = given && *arguments.key_mask.at(tile.batch, token, 0);
      any |= is_seen;
      words.word[quad] = __ballot_sync(0xffffffffu, is_seen || !given);
    }
    if (!__any_sync(0xffffffffu, any)) words = {};
    if (lane == 0) arguments.boxes[number * arguments.most_boxes + box] = words;
  }
}

}  // namespace cuneigh::hopper
