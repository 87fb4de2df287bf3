// Which keys a query sees along one token axis, and which queries see a key: the twin of
// cuneigh/_window.py, whose docstring states the rules. Plain C++17 as well, so that the host
// compiler can build it for the tests.
//
// Kernels know one kind of axis, `Axis`. Where all of a layout is given and windows are pushed
// inwards at its borders, that is `WholeAxis`; a kernel compiled with CUNEIGH_PARTS takes the other
// axes, too (`PartAxis`). Both have the same members. Indices and groups are those of the tokens
// that are given, of the queries or of the keys.
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
CUNEIGH_HOST_DEVICE int clamp(int a, int least, int most) {
  return smaller(larger(a, least), most);
}

// Division by a positive number, rounded down.
CUNEIGH_HOST_DEVICE int floor_div(int a, int b) { return a / b - (a % b < 0); }

// An axis whose queries and keys are the whole layout, or one of cross attention.
struct WholeAxis {
  static constexpr bool kIsPart = false;

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

  // The group of the keys that queries of `group` may see, and the other way round.
  CUNEIGH_HOST_DEVICE int key_group(int group) const { return group; }
  CUNEIGH_HOST_DEVICE int query_group(int group) const { return group; }

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

  // The largest multiple of the stride up to an index.
  CUNEIGH_HOST_DEVICE int whole_strides(int index) const {
    return stride == 1 ? index : index / stride * stride;
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
      return {index, smaller(whole_strides(index + kernel_size) + stride * past_end, queries)};
    }
    const int left = kernel_size / 2, right = kernel_size - 1 - left;
    int begin = 0, end = queries;
    if (index >= kernel_size) begin = whole_strides(index - right + stride - stride / 2 - 1);
    if (index < key_group_length(group) - kernel_size)
      end = whole_strides(index + left + stride - stride / 2);
    return {smaller(begin, queries), smaller(end, queries)};
  }

  // Whether ranges are unrolled, on a ring of this many tokens.
  CUNEIGH_HOST_DEVICE bool crosses() const { return false; }
  CUNEIGH_HOST_DEVICE int ring() const { return length; }
  // The index of the token that an index out of `window` or `inverse` means.
  CUNEIGH_HOST_DEVICE int turned(int index) const { return index; }
  // The keys that a query would see if all keys of the layout were given: slot 0 is its begin.
  CUNEIGH_HOST_DEVICE Range unclipped(int index, int group) const { return window(index, group); }
  // Added to the index of a key out of `window` less that of the query: their distance in the
  // layout. Likewise for a key and a query out of `inverse`.
  CUNEIGH_HOST_DEVICE int shift(int /*query_group*/) const { return 0; }
  CUNEIGH_HOST_DEVICE int inverse_shift(int /*key_group*/) const { return 0; }
  // The slot of key `key` among the logits of query `index` of `group`, which sees it.
  CUNEIGH_HOST_DEVICE int slot(int key, int index, int group) const {
    return key - window(index, group).begin;
  }
};
static_assert(sizeof(WholeAxis) == 24, "cuneigh/_gpu/records.py packs five integers and a bool");

enum class Border : unsigned char { kShift, kCut, kWrap };

// An axis of which parts are given, or with another border. On a ring whose seam is crossed ranges
// are unrolled: u of begin <= u < end, which is never negative, means index u % ring() of the
// group, and that is seen if it is less than the number of tokens given. No range is longer than
// the ring.
struct PartAxis {
  static constexpr bool kIsPart = true;
  static constexpr int kNoCrossing = -2147483647 - 1;

  int length;      // given queries
  int key_length;  // given keys
  int kernel_size;
  int stride;
  int dilation;
  int layout;  // tokens of the whole layout
  bool is_causal;
  Border border;
  char padding[6];
  // What changes with the starts follows; a launch replaces these two words.
  int query_start, key_start;  // tokens of the layout
  // By how much unrolled indices are moved on to become those of given tokens: multiples of ring().
  int key_turn, query_turn;  // query_turn is kNoCrossing where no window crosses the seam

  CUNEIGH_HOST_DEVICE int group_length(int group) const { return given(length, group); }
  CUNEIGH_HOST_DEVICE int key_group_length(int group) const { return given(key_length, group); }
  CUNEIGH_HOST_DEVICE int layout_group_length(int group) const { return given(layout, group); }
  CUNEIGH_HOST_DEVICE int token(GroupIndex at) const { return at.index * dilation + at.group; }
  CUNEIGH_HOST_DEVICE GroupIndex group_index(int position, int count) const {
    return WholeAxis{0, 0, 1, 1, dilation, false, {}}.group_index(position, count);
  }

  CUNEIGH_HOST_DEVICE int key_group(int group) const {
    return group_of(group + query_start - key_start);
  }
  CUNEIGH_HOST_DEVICE int query_group(int group) const {
    return group_of(group + key_start - query_start);
  }

  CUNEIGH_HOST_DEVICE bool crosses() const { return query_turn != kNoCrossing; }
  CUNEIGH_HOST_DEVICE int ring() const { return layout / dilation; }
  CUNEIGH_HOST_DEVICE int turned(int index) const { return crosses() ? index % ring() : index; }

  // Key indices that query `index` of `group` sees.
  CUNEIGH_HOST_DEVICE Range window(int index, int group) const {
    const Range all = unclipped(index, group);
    if (crosses()) return all;
    const int keys = key_group_length(key_group(group));
    return {clamp(all.begin, 0, keys), clamp(all.end, 0, keys)};
  }

  CUNEIGH_HOST_DEVICE Range unclipped(int index, int group) const {
    const int k = kernel_size;
    const int to_local = key_place(key_group(group));
    index += query_place(group);
    if (border == Border::kWrap) {
      const int length = ring(), turned = index + key_turn;
      const int lap = floor_div(turned, length) * length;
      const int begin = lap + leader(turned - lap, length) - k / 2 - to_local;
      return {begin, begin + k};
    }
    const int length = layout_group_length(group_of(group + query_start));
    const int of = leader(index, length);
    if (is_causal) return {larger(of - k + 1, 0) - to_local, index + 1 - to_local};
    const int begin = of - k / 2;
    if (border == Border::kCut)
      return {larger(begin, 0) - to_local, smaller(begin + k, length) - to_local};
    const int inside = smaller(larger(begin, 0), length - k) - to_local;
    return {inside, inside + k};
  }

  // Query indices that see key `index` of `group`.
  CUNEIGH_HOST_DEVICE Range inverse(int index, int group) const {
    const int own = query_group(group), queries = group_length(own);
    int to_local = query_place(own);
    index += key_place(group);
    Range seers;
    if (border == Border::kWrap) {
      const int k = kernel_size;
      index -= key_turn;
      seers = {first_led_by(index - (k - 1 - k / 2)), first_led_by(index + k / 2 + 1)};
      if (crosses()) {
        to_local -= query_turn;
        return {seers.begin - to_local, seers.end - to_local};
      }
    } else {
      const int length = layout_group_length(group_of(group + key_start));
      seers = seers_on_line(index, length, to_local + queries);
    }
    return {clamp(seers.begin - to_local, 0, queries), clamp(seers.end - to_local, 0, queries)};
  }

  CUNEIGH_HOST_DEVICE int shift(int group) const {
    return key_place(key_group(group)) - key_turn - query_place(group);
  }
  CUNEIGH_HOST_DEVICE int inverse_shift(int group) const {
    return shift(query_group(group)) + (crosses() ? query_turn : 0);
  }
  CUNEIGH_HOST_DEVICE int slot(int key, int index, int group) const {
    const int slot = key - unclipped(index, group).begin;
    return crosses() ? slot - floor_div(slot, ring()) * ring() : slot;
  }

 private:
  CUNEIGH_HOST_DEVICE int given(int count, int group) const {
    return dilation == 1 ? count : (count - group + dilation - 1) / dilation;
  }
  CUNEIGH_HOST_DEVICE int group_of(int token) const {
    return dilation == 1 ? 0 : token - floor_div(token, dilation) * dilation;
  }
  // The index in the layout of the first given query, or key, of a group.
  CUNEIGH_HOST_DEVICE int query_place(int group) const {
    return dilation == 1 ? query_start : (group + query_start) / dilation;
  }
  CUNEIGH_HOST_DEVICE int key_place(int group) const {
    return dilation == 1 ? key_start : (group + key_start) / dilation;
  }

  // The leader of a query of a group of `length` tokens, in indices of the layout.
  CUNEIGH_HOST_DEVICE int leader(int index, int length) const {
    if (stride == 1) return index;
    const int offset = is_causal ? stride - 1 : stride / 2;
    return smaller(index / stride * stride + offset, length - 1);
  }
  // On a ring the first query whose leader is not before this one.
  CUNEIGH_HOST_DEVICE int first_led_by(int leader) const {
    const int length = ring(), s = stride;
    const int lap = floor_div(leader, length) * length;
    return lap + smaller(s * ((leader - lap + s - 1 - s / 2) / s), length);
  }
  // Queries of the layout that see its key `index`, in a group of `length` tokens; those from
  // `last` on do not matter.
  CUNEIGH_HOST_DEVICE Range seers_on_line(int index, int length, int last) const {
    const int k = kernel_size, s = stride;
    if (is_causal) return {index, smaller(s * ((index + k) / s + (index + k >= length)), last)};
    const int left = k / 2, right = k - 1 - left;
    const int begin = s * ((index - right + s - s / 2 - 1) / s);
    const int end = s * ((index + left + s - s / 2) / s);
    if (border == Border::kCut)
      return {smaller(begin, s * ((length - 1) / s)), index + left >= length - 1 ? last : end};
    return {index >= k ? begin : 0, index >= length - k ? last : end};
  }
};
static_assert(sizeof(PartAxis) == 48, "cuneigh/_gpu/records.py packs it");

#ifdef CUNEIGH_PARTS
using Axis = PartAxis;
#else
using Axis = WholeAxis;
#endif

}  // namespace cuneigh
