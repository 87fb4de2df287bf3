// Where the elements of a problem lie in memory, and which lanes work on which token.
#pragma once

#include "cuneigh/window.cuh"

namespace cuneigh {

// A tensor [batch, x1..xr, heads, inner] with any strides, in elements. Tensors of another form
// have zeros for the strides that they lack. `Views` of cuneigh/_gpu/views.py packs them.
template <typename Element, int kRank>
struct View {
  Element* data;
  long long batch;
  long long token[kRank];
  long long head;
  long long inner;

  __device__ Element* at(int b, int h) const { return data + b * batch + h * head; }
  __device__ Element* at(int b, const int (&x)[kRank], int h) const {
    Element* element = at(b, h);
#pragma unroll
    for (int r = 0; r < kRank; ++r) element += x[r] * token[r];
    return element;
  }
};
static_assert(sizeof(View<float, 1>) == 40 && sizeof(View<float, 3>) == 56,
              "cuneigh/_gpu/views.py packs one word for each member");

// All that no array tells. `problem_type` of cuneigh/_gpu/records.py packs it.
template <int kRank>
struct Problem {
  Axis axes[kRank];
  int box[kRank];    // tokens that a block covers along each axis, in group-major order
  int boxes[kRank];  // blocks along each axis
  int batch;
  int heads;
  int group_size;  // query heads that share a key head
  int head_dim;
  int value_dim;
  int additional;  // number of additional keys
  double scale;
};
static_assert(sizeof(Problem<1>) == 40 + sizeof(Axis) &&
                  sizeof(Problem<2>) == 48 + 2 * sizeof(Axis) &&
                  sizeof(Problem<3>) == 56 + 3 * sizeof(Axis),
              "cuneigh/_gpu/records.py packs records of these sizes");

// The token, of one batch and head, that a group of lanes works on.
template <int kRank>
struct Item {
  int batch, head;
  GroupIndex group_index[kRank];
  int token[kRank];
  bool exists;  // false past the end of an axis or of the box
};

// The token of group number `group` of a block. Block `blockIdx.x` covers a box of the tokens of
// one batch and head: those of the keys if kKeys, else those of the queries.
template <bool kKeys, int kRank>
__device__ Item<kRank> item_of(const Problem<kRank>& problem, int group) {
  Item<kRank> item;
  unsigned block = blockIdx.x;
  item.exists = true;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const Axis& axis = problem.axes[r];
    const int count = kKeys ? axis.key_length : axis.length;
    const int inside = r == 0 ? group : group % problem.box[r];
    const int position = int(block % problem.boxes[r]) * problem.box[r] + inside;
    item.exists &= position < count && (r > 0 || inside < problem.box[0]);
    item.group_index[r] = axis.group_index(smaller(position, count - 1), count);
    item.token[r] = axis.token(item.group_index[r]);
    group /= problem.box[r];
    block /= problem.boxes[r];
  }
  const unsigned heads = kKeys ? problem.heads / problem.group_size : problem.heads;
  item.head = block % heads;
  item.batch = block / heads;
  return item;
}

// Calls visit(token) for every `stride`-th token of the layout from `first` on, in raster order.
template <int kRank, typename Visit>
__device__ void for_each_token(const Problem<kRank>& problem, unsigned first, unsigned stride,
                               Visit visit) {
  unsigned count = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) count *= problem.axes[r].length;
  for (unsigned i = first; i < count; i += stride) {
    int token[kRank];
    unsigned rest = i;
#pragma unroll
    for (int r = kRank - 1; r > 0; --r) {
      token[r] = rest % problem.axes[r].length;
      rest /= problem.axes[r].length;
    }
    token[0] = rest;
    visit(token);
  }
}

// A line of neighbors along the last axis: from one to the next only an address moves on.
template <int kRank>
struct Line {
  int first[kRank];     // token of the first neighbor
  int count;            // number of neighbors
  int offset[kRank];    // group index of the first neighbor less that of the range's begin
  int relative[kRank];  // group index of the first neighbor less that of the item, in the layout
};

// Queries, or keys, of a dilation group.
template <bool kKeys>
__device__ int neighbors_of(const Axis& axis, int group) {
  return kKeys ? axis.group_length(group) : axis.key_group_length(group);
}

// Calls visit(piece) for every piece of a line along the last axis whose neighbors are given and
// follow each other: more than one only across the seam of a ring.
template <bool kKeys, int kRank, typename Visit>
__device__ void for_each_piece(const Problem<kRank>& problem, const Item<kRank>& item, Range range,
                               const Line<kRank>& line, Visit visit) {
  constexpr int kLast = kRank - 1;
  const Axis& axis = problem.axes[kLast];
  const int group = item.group_index[kLast].group;
  const int others = kKeys ? axis.query_group(group) : axis.key_group(group);
  const int given = neighbors_of<kKeys>(axis, others);
  int begin = range.begin;
  while (begin < range.end) {
    const int turned = axis.turned(begin), lap = begin - turned;
    const int end = axis.crosses() ? smaller(range.end, lap + given) : range.end;
    if (begin < end) {
      Line<kRank> piece = line;
      piece.first[kLast] = axis.token({others, turned});
      piece.count = end - begin;
      piece.offset[kLast] = begin - range.begin;
      piece.relative[kLast] = line.relative[kLast] + piece.offset[kLast];
      visit(piece);
    }
    begin = axis.crosses() ? lap + axis.ring() : end;
  }
}

// Calls visit(line) for every line of the box of neighbors `range`, in ascending order. kKeys says
// that the item is a key, so that its neighbors are queries.
template <bool kKeys, int kRank, typename Visit>
__device__ void for_each_line(const Problem<kRank>& problem, const Item<kRank>& item,
                              const Range (&range)[kRank], Visit visit) {
  int lines = 1;
#pragma unroll
  for (int r = 0; r < kRank - 1; ++r) lines *= range[r].end - range[r].begin;
  for (int i = 0; i < lines; ++i) {
    Line<kRank> line;
    int rest = i;
    bool given = true;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      line.offset[r] = 0;
      if (r < kRank - 1) {
        const int extent = range[r].end - range[r].begin;
        line.offset[r] = r == 0 ? rest : rest % extent;
        rest = r == 0 ? 0 : rest / extent;
      }
      const Axis& axis = problem.axes[r];
      const auto [group, own] = item.group_index[r];
      const int index = range[r].begin + line.offset[r], turned = axis.turned(index);
      const int others = kKeys ? axis.query_group(group) : axis.key_group(group);
      line.first[r] = axis.token({others, turned});
      line.relative[r] = index - own;
      line.relative[r] += kKeys ? -axis.inverse_shift(group) : axis.shift(group);
      if (Axis::kIsPart && r < kRank - 1) given &= turned < neighbors_of<kKeys>(axis, others);
    }
    line.count = range[kRank - 1].end - range[kRank - 1].begin;
    if constexpr (!Axis::kIsPart)
      visit(line);
    else if (given)
      for_each_piece<kKeys>(problem, item, range[kRank - 1], line, visit);
  }
}

// The keys that a query sees, as one range for each axis.
template <int kRank>
__device__ void window_of(const Problem<kRank>& problem, const Item<kRank>& query,
                          Range (&range)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    range[r] = problem.axes[r].window(query.group_index[r].index, query.group_index[r].group);
}

// Calls visit(line, key_index) for every line of slots of a query along the last axis, in ascending
// order, whatever its keys: key_index(i) is the index of the key in slot i of the line, or negative
// where that is none that is given and in the window. `line.first` has the key's group along the
// last axis, and tokens along the others.
template <int kRank, typename Visit>
__device__ void for_each_slot_line(const Problem<kRank>& problem, const Item<kRank>& query,
                                   const Range (&window)[kRank], Visit visit) {
  constexpr int kLast = kRank - 1;
  Range all[kRank];
  int lines = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const auto [group, index] = query.group_index[r];
    all[r] = problem.axes[r].unclipped(index, group);
    if (r < kLast) lines *= problem.axes[r].kernel_size;
  }
  const auto index_of = [&](int r, int slot) {
    const Axis& axis = problem.axes[r];
    const int index = all[r].begin + slot;
    if (index < window[r].begin || index >= window[r].end) return -1;
    const int turned = axis.turned(index);
    return turned < axis.key_group_length(axis.key_group(query.group_index[r].group)) ? turned : -1;
  };
  for (int i = 0; i < lines; ++i) {
    Line<kRank> line;
    int rest = i;
    bool given = true;
#pragma unroll
    for (int r = kLast; r >= 0; --r) {
      const Axis& axis = problem.axes[r];
      const auto [group, own] = query.group_index[r];
      line.offset[r] = r == kLast ? 0 : r == 0 ? rest : rest % axis.kernel_size;
      if (r < kLast) rest /= axis.kernel_size;
      line.relative[r] = all[r].begin + line.offset[r] - own + axis.shift(group);
      line.first[r] = axis.key_group(group);
      if (r < kLast) {
        const int index = index_of(r, line.offset[r]);
        given &= index >= 0;
        line.first[r] = axis.token({line.first[r], larger(index, 0)});
      }
    }
    line.count = problem.axes[kLast].kernel_size;
    visit(line, [&](int slot) { return given ? index_of(kLast, slot) : -1; });
  }
}

// The queries that see a key, as one range for each axis.
template <int kRank>
__device__ void inverse_of(const Problem<kRank>& problem, const Item<kRank>& key,
                           Range (&range)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    range[r] = problem.axes[r].inverse(key.group_index[r].index, key.group_index[r].group);
}

// How many slots of a query's row of logits come before that of its window's begin, by axis: those
// of keys that are not given.
template <int kRank>
__device__ void slots_before(const Problem<kRank>& problem, const Item<kRank>& query,
                             const Range (&window)[kRank], int (&before)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const auto [group, index] = query.group_index[r];
    before[r] = Axis::kIsPart ? window[r].begin - problem.axes[r].unclipped(index, group).begin : 0;
  }
}

// The slot in a row of logits of the key at these offsets from slot 0 of every axis.
template <int kRank>
__device__ long long slot_of(const Problem<kRank>& problem, const int (&offset)[kRank]) {
  long long slot = 0;
#pragma unroll
  for (int r = 0; r < kRank; ++r) slot = slot * problem.axes[r].kernel_size + offset[r];
  return slot;
}

// The slots of a window; those of the additional keys follow.
template <int kRank>
__device__ long long window_size(const Problem<kRank>& problem) {
  long long size = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) size *= problem.axes[r].kernel_size;
  return size;
}

}  // namespace cuneigh
