// What a key mask says of boxes of columns, found once for all heads and blocks (seen.cu), and
// where a tile finds it.
#pragma once

#include "cuneigh/key_mask.cuh"
#include "hopper/tile.cuh"

namespace cuneigh::hopper {

// The words of a row or of a coordinate, one for each of the four lanes that share a row.
struct alignas(16) QuadWords {
  unsigned word[4];

  __device__ bool none() const { return (word[0] | word[1] | word[2] | word[3]) == 0; }
  __device__ bool all() const { return (word[0] & word[1] & word[2] & word[3]) == ~0u; }
  __device__ bool some() const { return !none() && !all(); }
};

template <typename Plan>
constexpr bool kMaskedColumns = Plan::kKeyMask && !Plan::kRowsAreKeys;

// Where columns are masked: the words of the columns that no mask hides, of every box of every
// tile. Columns that are no keys count as seen, for windows leave them out; but of a box of which
// no key is seen the words are 0.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct SeenBoxes {};
template <typename Plan>
struct SeenBoxes<Plan, true> {
  const QuadWords* boxes;  // [batch, tiles of a head, most_boxes]
  long long most_boxes;    // of a tile
};

// The key mask, if the kernel takes one, as rows or columns need it. A kernel's arguments begin
// with it.
template <typename Plan>
struct HiddenKeys : KeyMask<Plan, Plan::kKeyMask && Plan::kRowsAreKeys>, SeenBoxes<Plan> {};

// A tile, and where its boxes are in `SeenBoxes`.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct AnnouncedTile : Tile<Plan::kRank> {
  __device__ void place(const HiddenKeys<Plan>&, int) {}
  __device__ const QuadWords* seen(const HiddenKeys<Plan>&) const { return nullptr; }
};
template <typename Plan>
struct AnnouncedTile<Plan, true> : Tile<Plan::kRank> {
  int first_box;

  // `number` is what `find_tile` returned.
  __device__ void place(const HiddenKeys<Plan>& keys, int number) {
    first_box = number * int(keys.most_boxes);
  }
  __device__ const QuadWords* seen(const HiddenKeys<Plan>& keys) const {
    return keys.boxes + first_box;
  }
};

}  // namespace cuneigh::hopper
