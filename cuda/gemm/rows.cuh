// Rows of the dense matrices of tiles: which keys a row sees, and its biases.
#pragma once

#include "gemm/tiles.cuh"

namespace cuneigh::gemm {

// What a row of a tile sees along one axis.
struct Span {
  int begin, count;  // visible keys, counted from the first of the halo
  int bias;          // index into rpb for the first key of the halo
  int token;         // of the query; -1 past the end of the group
};

// What every query of a tile sees, axis by axis.
template <int kRank, int kMostQueries>
struct Spans {
  Span span[kRank][kMostQueries];  // of the queries at each coordinate

  // Every thread of the block must call it.
  __device__ void fill(const Tiles<kRank>& tiles, const Tile<kRank>& tile) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = tiles.problem.axes[r];
      const int group = tile.first[r].group;
      for (int i = threadIdx.x; i < tiles.problem.box[r]; i += blockDim.x) {
        const int index = tile.first[r].index + i;
        const bool exists = index < axis.group_length(group);
        const Range window = axis.window(index, group);
        span[r][i] = {window.begin - tile.halo[r], exists ? window.end - window.begin : 0,
                      tile.halo[r] - index + axis.kernel_size - 1,
                      exists ? axis.token({group, index}) : -1};
      }
    }
    __syncthreads();
  }
};

// One row of a tile.
template <int kRank>
struct TileRow {
  int head;
  bool exists;
  Span span[kRank];
  int token[kRank];

  template <int kMostQueries>
  __device__ TileRow(const Tiles<kRank>& tiles, const Tile<kRank>& tile,
                     const Spans<kRank, kMostQueries>& spans, const Divisor& queries,
                     const Extents<kRank>& box, unsigned row) {
    const int number = queries.divide(row);  // in the box; `row` becomes the query head
    head = tile.kv_head * tiles.problem.group_size + row;
    const Coordinates<kRank> query(number, box);
    exists = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      span[r] = spans.span[r][query.at[r]];
      token[r] = span[r].token;
      exists &= token[r] >= 0;
    }
  }

  // Whether it sees the key at these coordinates of the halo. A query past the end sees none.
  __device__ bool sees(const Coordinates<kRank>& key) const {
    bool seen = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r)
      seen &= unsigned(key.at[r] - span[r].begin) < unsigned(span[r].count);
    return seen;
  }
};

// Calls visit(tile, row, start) for the rows that this block takes of its tile; `start` is where
// the row begins in the matrices [tiles, rows, columns]. Block `blockIdx.x` takes a slice of tile
// `blockIdx.x / slices`, and a team of kLanes lanes takes a row.
template <typename Plan, typename Visit>
__device__ void for_each_row(const Tiles<Plan::kRank>& tiles, int slices, Visit visit) {
  constexpr int kTeams = Plan::kThreads / Plan::kLanes;
  __shared__ Spans<Plan::kRank, Plan::kMostQueries> spans_smem;
  const unsigned tile_index = blockIdx.x / unsigned(slices);
  const Tile<Plan::kRank> tile(tiles, tiles.first + tile_index);
  spans_smem.fill(tiles, tile);
  const Divisor queries(volume(tiles.problem.box));
  const Extents<Plan::kRank> box(tiles.problem.box);
  const int rows = queries.value * tiles.problem.group_size;
  const int first = blockIdx.x % unsigned(slices) * kTeams + threadIdx.x / Plan::kLanes;
  for (int row = first; row < rows; row += slices * kTeams)
    visit(tile, TileRow<Plan::kRank>(tiles, tile, spans_smem, queries, box, row),
          ((long long)tile_index * rows + row) * tiles.columns);
}

// Which keys of kVector neighboring columns a row sees: bit i for the i-th.
template <int kVector, int kRank>
__device__ unsigned seen_keys(const Tiles<kRank>& tiles, const Extents<kRank>& halo,
                              const TileRow<kRank>& row, int column, int keys) {
  Coordinates<kRank> key(column, halo);
  unsigned seen = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (row.sees(key)) seen |= 1u << i;
    key.advance(halo);
  }
  if (column + kVector > keys) {  // past the halo: additional keys, and padding
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i >= keys) {
        seen &= ~(1u << i);
        if (row.exists && column + i < keys + tiles.problem.additional) seen |= 1u << i;
      }
  }
  return seen;
}

// The bias of those keys; 0 for keys that are not seen, and for additional ones.
template <typename Plan, int kVector>
__device__ void load_bias(const Extents<Plan::kRank>& halo, const TileRow<Plan::kRank>& row,
                          int column, int keys, unsigned seen, const BiasView<Plan>& rpb,
                          Accumulator<typename Plan::Element> (&bias)[kVector]) {
  using Number = Accumulator<typename Plan::Element>;
#pragma unroll
  for (int i = 0; i < kVector; ++i) bias[i] = 0;
  if constexpr (!kSame<typename Plan::Bias, void>) {
    Coordinates<Plan::kRank> key(column, halo);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if ((seen >> i & 1) && column + i < keys) {
        int index[Plan::kRank];
#pragma unroll
        for (int r = 0; r < Plan::kRank; ++r) index[r] = row.span[r].bias + key.at[r];
        bias[i] = convert<Number>(*rpb.at(0, index, row.head));
      }
      key.advance(halo);
    }
  }
}

// What the weights of a tile are multiplied by where they are stored: in float16 small weights
// would be subnormal. The product with the values takes it back.
template <typename Element>
__device__ constexpr float weight_factor() {
  return kSame<Element, float16> ? 32768.0f : 1.0f;
}

}  // namespace cuneigh::gemm
