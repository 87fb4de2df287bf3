// What the kernels around the batched products share: tiles, their rows and their columns.
//
// A tile is a box of queries of one dilation group, for one batch entry and the query heads that
// share a key head, and its halo: a box of keys that holds every window of those queries. Rows of a
// tile are queries (member of the head group, then box in raster order), columns are keys (halo in
// raster order, then the additional keys, then padding). The products of a tile are dense; the
// kernels here turn them into what attention needs of them, where a hidden pair is a zero.
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

namespace cuneigh::gemm {

// Its twin is `_record` in cuneigh/_backends/gemm. Problem::box and Problem::boxes are those of the
// queries.
template <int kRank>
struct Tiles {
  Problem<kRank> problem;
  int halo[kRank];  // keys along each axis
  int columns;      // row length of the matrices [tiles, rows, columns]
  long long first;  // the first tile of this chunk
  long long count;
};
static_assert(sizeof(Tiles<1>) == 88 && sizeof(Tiles<2>) == 128 && sizeof(Tiles<3>) == 160,
              "the record that cuneigh/_backends/gemm packs has these sizes");

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
__device__ inline int halo_begin(const Axis& axis, Place first, int halo) {
  const int latest = axis.key_group_length(first.group) - halo;
  return larger(0, smaller(axis.window(first.index, first.group).begin, latest));
}

// Where a tile lies.
template <int kRank>
struct Tile {
  int batch, kv_head;
  Place first[kRank];  // its first query
  int halo[kRank];     // group index of its first key

  __device__ Tile(const Tiles<kRank>& tiles, long long tile) {
    const Problem<kRank>& problem = tiles.problem;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const Axis& axis = problem.axes[r];
      const int box = int(tile % problem.boxes[r]);
      first[r] = box_place(axis.dilation, axis.length, box, problem.box[r]);
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
  int first[kRank], step[kRank], count[kRank];

  template <bool kKeys>
  __device__ static TileTokens of(const Tiles<kRank>& tiles, const Tile<kRank>& tile) {
    TileTokens tokens;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = tiles.problem.axes[r];
      const int group = tile.first[r].group;
      const int index = kKeys ? tile.halo[r] : tile.first[r].index;
      tokens.first[r] = axis.token({group, index});
      tokens.step[r] = axis.dilation;
      tokens.count[r] = (kKeys ? axis.key_group_length(group) : axis.group_length(group)) - index;
    }
    return tokens;
  }
  // The token at these coordinates; false if there is none.
  __device__ bool find(const int (&at)[kRank], int (&token)[kRank]) const {
    bool exists = true;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      exists &= at[r] < count[r];
      token[r] = first[r] + at[r] * step[r];
    }
    return exists;
  }
};

template <int kRank>
__device__ int volume(const int (&extent)[kRank]) {
  int product = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) product *= extent[r];
  return product;
}

// Division by a number that many numbers are divided by.
struct Divisor {
  unsigned value, inverse;

  Divisor() = default;
  __device__ explicit Divisor(unsigned value)
      : value(value), inverse(value > 1 ? 0xffffffffu / value + 1 : 0) {}

  // `n`, less than 2^31, becomes the quotient; the remainder is returned.
  __device__ int divide(unsigned& n) const {
    if (value == 1) return 0;
    unsigned quotient = __umulhi(n, inverse);  // or one too many
    int rest = n - quotient * value;
    if (rest < 0) {
      --quotient;
      rest += value;
    }
    n = quotient;
    return rest;
  }
};

// The extents of a box, ready for many divisions by them.
template <int kRank>
struct Extents {
  Divisor inner[kRank > 1 ? kRank - 1 : 1];  // of all axes but the first

  __device__ explicit Extents(const int (&size)[kRank]) {
#pragma unroll
    for (int r = 1; r < kRank; ++r) inner[r - 1] = Divisor(size[r]);
  }
  __device__ int size(int r) const { return int(inner[r - 1].value); }
};

// Coordinates in a box of the given extents.
template <int kRank>
struct Coordinates {
  int at[kRank];

  __device__ Coordinates(unsigned place, const Extents<kRank>& extents) {
#pragma unroll
    for (int r = kRank - 1; r > 0; --r) at[r] = extents.inner[r - 1].divide(place);
    at[0] = place;
  }
  // To the next place in raster order.
  __device__ void advance(const Extents<kRank>& extents) {
    ++at[kRank - 1];
#pragma unroll
    for (int r = kRank - 1; r > 0; --r)
      if (at[r] == extents.size(r)) {
        at[r] = 0;
        ++at[r - 1];
      }
  }
};

// What a row of a tile sees along one axis.
struct Span {
  int begin, count;  // visible keys, counted from the first of the halo
  int relative;      // entry of rpb for the first key of the halo
  int token;         // of the query; -1 past the end of the group
};

// The spans of all queries of a tile, axis by axis.
template <int kRank, int kMostQueries>
struct Spans {
  Span span[kRank][kMostQueries];

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
    const int place = queries.divide(row);
    head = tile.kv_head * tiles.problem.group_size + row;
    const Coordinates<kRank> query(place, box);
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

// Calls visit(row) for the rows that this block takes of its tile. Block `blockIdx.x` takes a slice
// of tile `blockIdx.x / slices`; a team of kLanes lanes takes a row.
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
        int relative[Plan::kRank];
#pragma unroll
        for (int r = 0; r < Plan::kRank; ++r) relative[r] = row.span[r].relative + key.at[r];
        bias[i] = convert<Number>(*rpb.at(0, relative, row.head));
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
