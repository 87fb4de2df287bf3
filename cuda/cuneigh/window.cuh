// Which keys a query sees along one token axis, and which queries see a key: the twin of
// cuneigh/_window.py, whose docstring states the rules. Plain C++17 as well, so that the host
// compiler can build it for the tests.
#pragma once

#ifdef __CUDACC__
#define CUNEIGH_HOST_DEVICE __host__ __device__ inline
#else
#define CUNEIGH_HOST_DEVICE inline
#endif

namespace cuneigh {

struct Range {
  int begin, end;  // half open
};

// A token as attention sees it: number `index` of dilation group `group`.
struct GroupIndex {
  int group, index;
};

CUNEIGH_HOST_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
CUNEIGH_HOST_DEVICE int larger(int a, int b) { return a > b ? a : b; }

struct Axis {
  int length;      // queries
  int key_length;  // keys; differs from length only in cross attention, where all keys are seen
  int kernel_size;
  int stride;
  int dilation;
  bool is_causal;
  char padding[3];

  // (A division takes a GPU longer than the question whether it is needed.)
  CUNEIGH_HOST_DEVICE int group_length(int group) const {
    return dilation == 1 ? length : (length - group + dilation - 1) / dilation;
  }
  CUNEIGH_HOST_DEVICE int key_group_length(int group) const {
    return dilation == 1 ? key_length : (key_length - group + dilation - 1) / dilation;
  }
  CUNEIGH_HOST_DEVICE int token(GroupIndex at) const { return at.index * dilation + at.group; }

  // The token at `position` of `count` tokens in group-major order, in which neighbors are
  // neighbors in attention, too.
  CUNEIGH_HOST_DEVICE GroupIndex group_index(int position, int count) const {
    if (dilation == 1) return {0, position};
    const int shorter = count / dilation;        // length of the last groups,
    const int longer_groups = count % dilation;  // the first ones having one more
    const int in_longer = longer_groups * (shorter + 1);
    if (position < in_longer) return {position / (shorter + 1), position % (shorter + 1)};
    position -= in_longer;
    return {longer_groups + position / shorter, position % shorter};
  }

  // Key indices that query `index` of `group` sees.
  CUNEIGH_HOST_DEVICE Range window(int index, int group) const {
    int leader = index;
    if (stride > 1) {
      const int offset = is_causal ? stride - 1 : stride / 2;
      leader = smaller(index / stride * stride + offset, group_length(group) - 1);
    }
    if (is_causal) return {larger(leader - kernel_size + 1, 0), index + 1};
    const int latest = key_group_length(group) - kernel_size;
    const int begin = smaller(larger(leader - kernel_size / 2, 0), latest);
    return {begin, begin + kernel_size};
  }

  // Query indices that see key `index` of `group`.
  CUNEIGH_HOST_DEVICE Range inverse(int index, int group) const {
    const int queries = group_length(group);
    if (is_causal) {
      const bool past_end = index + kernel_size >= queries;
      return {index, smaller(stride * ((index + kernel_size) / stride + past_end), queries)};
    }
    const int left = kernel_size / 2, right = kernel_size - 1 - left;
    int begin = 0, end = queries;
    if (index >= kernel_size) begin = stride * ((index - right + stride - stride / 2 - 1) / stride);
    if (index < key_group_length(group) - kernel_size)
      end = stride * ((index + left + stride - stride / 2) / stride);
    return {smaller(begin, queries), smaller(end, queries)};
  }
};
static_assert(sizeof(Axis) == 24, "cuneigh/_gpu/records.py packs five integers and a bool");

}  // namespace cuneigh
