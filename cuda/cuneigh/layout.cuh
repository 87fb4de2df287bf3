// Where the elements of a problem lie in memory, and which thread works on which token.
#pragma once

#include "cuneigh/window.cuh"

namespace cuneigh {

// A tensor [batch, x1..xr, heads, inner] of any strides, counted in elements. Tensors of another
// form leave the strides they do not have at 0.
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

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/naive/__init__.py.
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
              "the record that cuneigh/_backends/naive/__init__.py packs has these sizes");

// The token of one batch entry and one head that a group of lanes works on.
template <int kRank>
struct Item {
  int batch, head;
  Place place[kRank];
  int token[kRank];
  bool exists;  // false past the end of an axis or of the box
};

// Block `blockIdx.x` covers a box of the tokens of one (batch, head); the member `member` of it is
// one token. `kKeys` says whose tokens and heads are meant: the keys' or the queries'.
template <bool kKeys, int kRank>
__device__ Item<kRank> item_of(const Problem<kRank>& problem, int member) {
  Item<kRank> item;
  unsigned block = blockIdx.x;
  item.exists = true;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const Axis& axis = problem.axes[r];
    const int count = kKeys ? axis.key_length : axis.length;
    const int inside = r == 0 ? member : member % problem.box[r];
    const int position = int(block % problem.boxes[r]) * problem.box[r] + inside;
    item.exists &= position < count && (r > 0 || inside < problem.box[0]);
    item.place[r] = axis.place(smaller(position, count - 1), count);
    item.token[r] = axis.token(item.place[r]);
    member /= problem.box[r];
    block /= problem.boxes[r];
  }
  const unsigned heads = kKeys ? problem.heads / problem.group_size : problem.heads;
  item.head = block % heads;
  item.batch = block / heads;
  return item;
}

// Calls visit(token) for every `step`-th token of the layout from `first` on, in raster order.
template <int kRank, typename Visit>
__device__ void for_each_token(const Problem<kRank>& problem, unsigned first, unsigned step,
                               Visit visit) {
  unsigned count = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) count *= problem.axes[r].length;
  for (unsigned i = first; i < count; i += step) {
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

// One line of neighbors along the last axis; all that differs from neighbor to neighbor is a step.
template <int kRank>
struct Line {
  int first[kRank];   // token of the first neighbor
  int count;          // number of neighbors
  int offset[kRank];  // group index of the first neighbor less that of the window's begin
  int shift[kRank];   // group index of the first neighbor less that of the item
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
      const Place neighbor = {item.place[r].group, range[r].begin + line.offset[r]};
      line.first[r] = problem.axes[r].token(neighbor);
      line.shift[r] = neighbor.index - item.place[r].index;
    }
    line.count = range[kRank - 1].end - range[kRank - 1].begin;
    visit(line);
  }
}

// The keys that a query sees, as one range per axis.
template <int kRank>
__device__ void window_of(const Problem<kRank>& problem, const Item<kRank>& query,
                          Range (&range)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    range[r] = problem.axes[r].window(query.place[r].index, query.place[r].group);
}

// The queries that see a key, as one range per axis.
template <int kRank>
__device__ void inverse_of(const Problem<kRank>& problem, const Item<kRank>& key,
                           Range (&range)[kRank]) {
#pragma unroll
  for (int r = 0; r < kRank; ++r)
    range[r] = problem.axes[r].inverse(key.place[r].index, key.place[r].group);
}

}  // namespace cuneigh
