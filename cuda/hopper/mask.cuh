// Which pairs of a tile's queries and a box of keys are visible.
//
// A thread of a warpgroup holds 32 logits of a query for each 128 keys: bit t of a word stands for
// the key 8 (t / 2) + 2 quad + t % 2, where quad is lane % 4. Two warps that do nothing else make
// these words for each box, and say for each warpgroup whether it needs them: consumers know
// nothing of the geometry.
#pragma once

#include "hopper/tile.cuh"

namespace cuneigh::hopper {

constexpr int kRows = 64;  // of a warpgroup

// What a warpgroup does with a box of keys.
enum Visibility : int {
  kNone,     // no query sees any key: pass it over
  kPartial,  // the words say who sees what
  kAll,      // every query sees every key
};

struct alignas(16) QuadWords {  // of the four lanes that share a query
  unsigned word[4];
};

// Along each axis, the keys of a box before a coordinate: entry `offset[r] + v` has the bits of the
// keys whose coordinate along axis r is less than v. Keys past the end of the box are in none.
template <int kRank>
struct PrefixTable {
  static constexpr int kEntries = 128 + 2 * kRank;  // at least the sum of key_box[r] + 1
  QuadWords entry[kEntries];
};

template <int kRank>
__device__ void fill_prefixes(const HopperProblem<kRank>& problem, PrefixTable<kRank>& table,
                              int thread, int threads, int keys) {
  int area = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) area *= problem.key_box[r];
  int base = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    int inner = 1;  // keys between neighbors along this axis
#pragma unroll
    for (int s = r + 1; s < kRank; ++s) inner *= problem.key_box[s];
    const int length = problem.key_box[r], entries = length + 1;
    for (int i = thread; i < 4 * entries; i += threads) {
      const int quad = i % 4, before = i / 4;
      unsigned word = 0;
      for (int t = 0; t < keys / 4; ++t) {
        const int key = 8 * (t / 2) + 2 * quad + t % 2;
        if (key < area && key / inner % length < before) word |= 1u << t;
      }
      table.entry[base + before].word[quad] = word;
    }
    base += entries;
  }
}

// What the two mask warps keep in shared memory. Warp `half` makes the words of the rows
// 32 half .. 32 half + 31 of each warpgroup.
template <int kRank, int kWarpgroups>
struct MaskTables {
  PrefixTable<kRank> prefixes;
  unsigned char coordinate[kRank][kRows];  // of a query in its warpgroup's box
  Range window[kWarpgroups][kRank][kRows];  // of a query, in keys from the first of the tile on
  Sight sight[2][kWarpgroups][kRank];  // what a warpgroup's queries see, from there on
};

// Fills what does not depend on the tile. Every thread of the block must call it.
template <int kRank, int kWarpgroups>
__device__ void fill_mask_tables(const HopperProblem<kRank>& problem,
                                 MaskTables<kRank, kWarpgroups>& tables, int keys) {
  fill_prefixes(problem, tables.prefixes, threadIdx.x, blockDim.x, keys);
  if (threadIdx.x < kRows) {
    int rest = threadIdx.x;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      tables.coordinate[r][threadIdx.x] = rest % problem.query_box[r];
      rest /= problem.query_box[r];
    }
  }
}

// Looks up the windows of a tile's queries. A warpgroup that begins past the end of an axis sees
// nothing.
template <typename Plan, int kRank, int kWarpgroups>
__device__ void begin_tile(const HopperProblem<kRank>& problem, const Tile<kRank>& tile,
                           MaskTables<kRank, kWarpgroups>& tables, int half, int lane) {
#pragma unroll 1
  for (int w = 0; w < kWarpgroups; ++w) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis axis = axis_of<Plan>(problem, r);
      const int group = tile.first[r].group, base = tile.keys[r].begin;
      const int first = tile.first[r].index + problem.warpgroup[w][1 + r];
      const int row = 32 * half + lane, end = axis.group_length(group);
      const int index = smaller(first + tables.coordinate[r][row], end - 1);
      const Range window = axis.window(index, group);
      tables.window[w][r][row] = {window.begin - base, window.end - base};
      if (lane == 0) {
        const int last = smaller(first + problem.query_box[r], end) - 1;
        Sight sight = {{0, 0}, {0, 0}};
        if (first < end) {
          const Range low = axis.window(first, group), high = axis.window(last, group);
          sight = {{low.begin - base, high.end - base}, {high.begin - base, low.end - base}};
        }
        tables.sight[half][w][r] = sight;
      }
    }
  }
  __syncwarp();
}

// What warpgroup `w` does with the box of keys that begins `first` keys after the first of the tile.
template <int kRank, int kWarpgroups>
__device__ Visibility visibility_of(const HopperProblem<kRank>& problem,
                                    const MaskTables<kRank, kWarpgroups>& tables, int half, int w,
                                    const int (&first)[kRank], bool whole) {
  bool none = false, all = whole;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const Sight sight = tables.sight[half][w][r];
    const int end = first[r] + problem.key_box[r];
    none |= sight.misses(first[r], end);
    all &= sight.covers(first[r], end);
  }
  return none ? kNone : all ? kAll : kPartial;
}

// Makes the words of a row of warpgroup `w`.
template <int kRank, int kWarpgroups>
__device__ void make_words(const HopperProblem<kRank>& problem,
                           const MaskTables<kRank, kWarpgroups>& tables, int w, int row,
                           const int (&first)[kRank], QuadWords& words) {
  int before[kRank], until[kRank];  // entries
  int base = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const Range window = tables.window[w][r][row];
    const int length = problem.key_box[r];
    const auto entry = [&](int key) {
      return base + smaller(larger(key - first[r], 0), length);
    };
    before[r] = entry(window.begin);
    until[r] = entry(window.end);
    base += length + 1;
  }
#pragma unroll 1  // registers are few
  for (int quad = 0; quad < 4; ++quad) {
    unsigned word = ~0u;
#pragma unroll
    for (int r = 0; r < kRank; ++r) 
      word &= tables.prefixes.entry[until[r]].word[quad] &
              ~tables.prefixes.entry[before[r]].word[quad];
    words.word[quad] = word;
  }
}

// Makes the words of a row that sees the keys of a box before the key `end`, in the order of the box.
__device__ inline void make_words(int end, QuadWords& words) {
#pragma unroll 1
  for (int quad = 0; quad < 4; ++quad) {
    const int left = larger(end - 2 * quad, 0);
    const int bits = left / 8 * 2 + smaller(left % 8, 2);
    words.word[quad] = bits >= 32 ? ~0u : (1u << bits) - 1;
  }
}

// Hides the logits of one of a thread's two queries whose bit in `word` is 0.
template <int kLogits>
__device__ void hide(float (&logit)[kLogits], int half, unsigned word) {
#pragma unroll
  for (int t = 0; t < kLogits / 2; ++t) {
    float& x = logit[4 * (t / 2) + 2 * half + t % 2];
    x = word & 1u << t ? x : -infinity<float>();
  }
}

}  // namespace cuneigh::hopper
