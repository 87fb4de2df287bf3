// Tiles: what the kernels around the batched products read and write.
//
// A tile is a box of queries of one dilation group, for one batch and the query heads that share a
// key head, and its halo: a box of keys that holds every window of those queries. Rows of a tile
// are queries (by query head, then the box in raster order), columns are keys (the halo in raster
// order, then the additional keys, then padding). The products of a tile are dense: S = Q K^T is
// [rows, columns], where a hidden pair counts as zero once the kernels here are done with it.
//
// struct Plan {
//   static constexpr int kRank, kThreads;
//   using Element;  dtype of the tensors
//   ...             what one kernel alone knows
// };
#pragma once

#include "cuneigh/boxes.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/row.cuh"
#include "gemm/division.cuh"

namespace cuneigh::gemm {

// The tiles of one launch. Problem::box and Problem::boxes are those of the queries. `_record` of
// cuneigh/_backends/gemm/walk.py packs it.
template <int kRank>
struct Tiles {
  Problem<kRank> problem;
  int halo[kRank];  // keys along each axis
  int columns;      // row length of the matrices [tiles, rows, columns]
  long long first;  // the first tile of this chunk
  long long count;  // tiles of this chunk
};
static_assert(sizeof(Tiles<1>) == 88 && sizeof(Tiles<2>) == 128 && sizeof(Tiles<3>) == 160,
              "cuneigh/_backends/gemm/walk.py packs records of these sizes");

template <typename Plan>
using ConstView = View<const typename Plan::Element, Plan::kRank>;
template <typename Plan>
using MutableView = View<typename Plan::Element, Plan::kRank>;
template <typename Plan>
using NumberView = View<Accumulator<typename Plan::Element>, Plan::kRank>;
template <typename Plan>
using ConstNumberView = View<const Accumulator<typename Plan::Element>, Plan::kRank>;
template <typename Plan>
using BiasView = View<const typename Plan::Bias, Plan::kRank>;

// Along one axis: the group index of the first key of the halo of the box that begins at `first`.
// It is moved inwards so that no halo reaches past the end of a group that is long enough for it.
__device__ inline int halo_begin(const Axis& axis, GroupIndex first, int halo) {
  const int latest = axis.key_group_length(first.group) - halo;
  return larger(0, smaller(axis.window(first.index, first.group).begin, latest));
}

// Which queries and keys a tile holds.
template <int kRank>
struct Tile {
  int batch, kv_head;
  GroupIndex first[kRank];  // its first query
  int halo[kRank];          // group index of its first key

  __device__ Tile(const Tiles<kRank>& tiles, long long tile) {
    const Problem<kRank>& problem = tiles.problem;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Axis& axis = problem.axes[r];
      const int box = int(tile % problem.boxes[r]);
      first[r] = box_begin(axis.dilation, axis.length, box, problem.box[r]);
      halo[r] = halo_begin(axis, first[r], tiles.halo[r]);
      tile /= problem.boxes[r];
    }
    const int kv_heads = problem.heads / problem.group_size;
    kv_head = int(tile % kv_heads);
    batch = int(tile / kv_heads);
  }
};

// The tokens of the queries or of the halo of a tile, along each axis.
template <int kRank>
struct TileTokens {
  int first[kRank], stride[kRank], count[kRank];

  template <bool kKeys>
  __device__ static TileTokens of(const Tiles<kRank>& tiles, const Tile<kRank>& tile) {
    TileTokens tokens;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = tiles.problem.axes[r];
      const int group = tile.first[r].group;
      const int index = kKeys ? tile.halo[r] : tile.first[r].index;
      tokens.first[r] = axis.token({group, index});
      tokens.stride[r] = axis.dilation;
      tokens.count[r] = (kKeys ? axis.key_group_length(group) : axis.group_length(group)) - index;
    }
    return tokens;
  }
  // Finds the token at these coordinates of the box; false if there is none.
  __device__ bool find(const int (&at)[kRank], int (&token)[kRank]) const {
    bool exists = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      exists &= at[r] < count[r];
      token[r] = first[r] + at[r] * stride[r];
    }
    return exists;
  }
};

}  // namespace cuneigh::gemm
