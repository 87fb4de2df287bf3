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
static_assert(sizeof(Problem<1>) == 64 && sizeof(Problem<2>) == 96 && sizeof(Problem<3>) == 128,
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
  int offset[kRank];    // group index of the first neighbor less that of the window's begin
  int relative[kRank];  // group index of the first neighbor less that of the item
};

// Calls visit(line) for every line of the box of neighbors `range`, in ascending order.
template <int kRank, typename Visit>
__device__ void for_each_line(const Problem<kRank>& problem, const Item<kRank>& item,
                              const Range (&range)[kRank], Visit visit) {
  int lines = 1;
#pragma unroll
  for (int r = 0; r < kRank - 1; ++r) lines *= range[r].end - range[r].begin;
  for (int i = 0; i < lines; ++i) {
    Line<kRank> line;
    int rest = i;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      line.offset[r] = 0;
      if (r < kRank - 1) {
        const int extent = range[r].end - range[r].begin;
        line.offset[r] = r == 0 ? rest : rest % extent;
        rest = r == 0 ? 0 : rest / extent;
      }
      const GroupIndex neighbor = {item.group_index[r].group, range[r].begin + line.offset[r]};
      line.first[r] = problem.axes[r].token(neighbor);
      line.relative[r] = neighbor.index - item.group_index[r].index;
    }
    line.count = range[kRank - 1].end - range[kRank - 1].begin;
    visit(line);
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

// The queries that see a key, as one range for each axis.
template <int kRank>
__device__ void inverse_of(const Problem<kRank>& problem, const Item<kRank>& key,
                           Range (&range)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    range[r] = problem.axes[r].inverse(key.group_index[r].index, key.group_index[r].group);
}

// The slot in a row of logits of the key at these offsets from the window's begin.
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
