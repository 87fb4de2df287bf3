// Which pairs of a tile's queries and a box of keys are visible.
//
// A thread of a warpgroup holds a query's logits with 32 of 128 keys: bit t of a word stands for
// the key 8 (t / 2) + 2 quad + t % 2, where quad is lane % 4. A pair is visible if it is so along
// every axis, so that the word of a query is the conjunction of one word for its coordinate along
// each axis. Two warps make those words for each box of keys, and say for each warpgroup whether it
// needs them: consumers know nothing of the geometry.
#pragma once

#include "hopper/tile.cuh"

namespace cuneigh::hopper {

// What a warpgroup does with a box of keys.
enum Visibility : int {
  kNone,     // no query sees any key: pass it over
  kPartial,  // the words say who sees what
  kAll,      // every query sees every key
};

struct alignas(16) QuadWords {  // of the four lanes that share a query
  unsigned word[4];
};

// A coordinate is a place along one axis of a warpgroup's box of queries, which has, for 8 x 8
// queries, 16 of them. Those of all warpgroups are numbered one after another.
template <int kRank>
constexpr int kMostCoordinates = kRank == 1 ? kRows : 36;

struct Coordinate {
  int axis;
  int offset;    // from the first query of the tile
  Range window;  // in keys from the first of the tile on
};

template <int kRank, int kWarpgroups>
struct MaskTables {
  // Of the keys of a box: entry `prefix_base[r] + v` has the bits of those before the coordinate v
  // along axis r.
  QuadWords prefix[128 + 2 * kRank];
  int prefix_base[kRank];
  unsigned char number[kRank][kRows];  // of the coordinates of a query
  // Of a tile. Each lane of the mask warps reads what it wrote itself
  Coordinate coordinate[kWarpgroups * kMostCoordinates<kRank>];
  WindowUnion windows[kRank][64];  // of the warpgroup that the lane looks after
};

// Which axis and query a coordinate stands for.
template <int kRank>
__device__ Coordinate coordinate_of(const HopperProblem<kRank>& problem, int number) {
  const int w = number / problem.coordinates;
  number -= w * problem.coordinates;
  Coordinate coordinate = {};
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    if (number >= 0 && number < problem.query_box[r])
      coordinate = {r, problem.warpgroup[w][1 + r] + number, {}};
    number -= problem.query_box[r];
  }
  return coordinate;
}

// Fills the tables. Every thread of the block must call it.
template <int kRank, int kWarpgroups>
__device__ void fill_mask_tables(const HopperProblem<kRank>& problem,
                                 MaskTables<kRank, kWarpgroups>& tables, int keys) {
  int base = 0, inner = keys;  // keys between neighbors along the axis
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int length = problem.key_box[r], entries = length + 1;
    inner /= length;
    for (int i = threadIdx.x; i < 4 * entries; i += blockDim.x) {
      const int quad = i % 4, before = i / 4;
      unsigned word = 0;
      for (int t = 0; t < keys / 4; ++t) {
        const int key = 8 * (t / 2) + 2 * quad + t % 2;
        if (key / inner % length < before) word |= 1u << t;
      }
      tables.prefix[base + before].word[quad] = word;
    }
    if (threadIdx.x == 0) tables.prefix_base[r] = base;
    base += entries;
  }
  for (int i = threadIdx.x; i < kWarpgroups * problem.coordinates; i += blockDim.x)
    tables.coordinate[i] = coordinate_of(problem, i);
  if (threadIdx.x < kRows) {
    int rest = threadIdx.x, number = problem.coordinates;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      number -= problem.query_box[r];
      tables.number[r][threadIdx.x] = number + rest % problem.query_box[r];
      rest /= problem.query_box[r];
    }
  }
}

// Looks up what the coordinates of a tile's queries see, and the warpgroup `w` as a whole.
template <typename Plan>
__device__ void look_up(const HopperProblem<Plan::kRank>& problem, const Tile<Plan::kRank>& tile,
                        int lane, int w, MaskTables<Plan::kRank, Plan::kWarpgroups>& tables) {
#pragma unroll 1
  for (int i = lane; i < Plan::kWarpgroups * problem.coordinates; i += 64) {
    Coordinate& coordinate = tables.coordinate[i];
    const int r = coordinate.axis, base = tile.keys[r].begin;
    const Axis axis = axis_of<Plan>(problem, r);
    const GroupIndex first = tile.first[r];
    const int last = axis.group_length(first.group) - 1;
    const Range window = axis.window(smaller(first.index + coordinate.offset, last), first.group);
    coordinate.window = {window.begin - base, window.end - base};
  }
#pragma unroll 1
  for (int r = 0; r < Plan::kRank; ++r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const int group = tile.first[r].group, base = tile.keys[r].begin;
    const int first = tile.first[r].index + problem.warpgroup[w][1 + r];
    const int end = axis.group_length(group);
    WindowUnion windows = {{0, 0}, {0, 0}};
    if (first < end && tile.active >> w & 1) {  // else it has no queries
      const Range low = axis.window(first, group);
      const Range high = axis.window(smaller(first + problem.query_box[r], end) - 1, group);
      windows = {{low.begin - base, high.end - base}, {high.begin - base, low.end - base}};
    }
    tables.windows[r][lane] = windows;
  }
}

// What the warpgroup that the lane looks after does with the box of keys that begins at `first`.
template <int kRank, int kWarpgroups>
__device__ Visibility visibility_of(const HopperProblem<kRank>& problem,
                                    const MaskTables<kRank, kWarpgroups>& tables, int lane,
                                    const int (&first)[kRank]) {
  bool none = false, all = true;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const int end = first[r] + problem.key_box[r];
    const WindowUnion windows = tables.windows[r][lane];
    none |= windows.misses(first[r], end);
    all &= windows.covers(first[r], end);
  }
  return none ? kNone : all ? kAll : kPartial;
}

// Makes the words of the lane's coordinates for the box of keys that begins at `first`.
template <int kRank, int kWarpgroups>
__device__ void make_words(const HopperProblem<kRank>& problem,
                           const MaskTables<kRank, kWarpgroups>& tables, int lane,
                           const int (&first)[kRank], QuadWords* words) {
#pragma unroll 1
  for (int i = lane; i < kWarpgroups * problem.coordinates; i += 64) {
    const int r = tables.coordinate[i].axis;
    int begin = first[0];
#pragma unroll
    for (int other = 1; other < kRank; ++other)
      if (r == other) begin = first[other];
    const auto entry = [&](int key) {
      return tables.prefix_base[r] + smaller(larger(key - begin, 0), problem.key_box[r]);
    };
    const int before = entry(tables.coordinate[i].window.begin);
    const int until = entry(tables.coordinate[i].window.end);
#pragma unroll 1  // registers are few
    for (int quad = 0; quad < 4; ++quad)
      words[i].word[quad] = tables.prefix[until].word[quad] & ~tables.prefix[before].word[quad];
  }
}

// The word of the keys of a box before the key `end`, in the order of the box.
__device__ inline unsigned first_keys(int end, int quad) {
  const int left = larger(end - 2 * quad, 0);
  const int bits = left / 8 * 2 + smaller(left % 8, 2);
  return bits >= 32 ? ~0u : (1u << bits) - 1;
}

// Hides the logits of one of a thread's two queries whose bit in `word` is 0.
template <int kTiles>
__device__ void hide(float (&logit)[kTiles][4], int half, unsigned word) {
#pragma unroll
  for (int t = 0; t < 2 * kTiles; ++t) {
    float& x = logit[t / 2][2 * half + t % 2];
    x = word & 1u << t ? x : -infinity<float>();
  }
}

}  // namespace cuneigh::hopper
