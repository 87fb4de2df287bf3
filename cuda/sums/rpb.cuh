// An element of the relative positional bias (rpb), and the keys that lie there.
#pragma once

#include "cuneigh/key_mask.cuh"
#include "cuneigh/layout.cuh"

namespace cuneigh::sums {

// Which element of one head of rpb a block sums, and which share of the queries.
template <int kRank>
struct BiasElement {
  int head, kv_head;
  int index[kRank];     // of the element
  int relative[kRank];  // key less query
  unsigned share, shares;
  unsigned head_and_element, elements;  // its number among those of all heads, and those of a head

  __device__ explicit BiasElement(const Problem<kRank>& problem) {
    elements = 1;
#pragma unroll
    for (int r = 0; r < kRank; ++r) elements *= 2 * problem.axes[r].kernel_size - 1;
    shares = gridDim.x / (problem.heads * elements);
    share = blockIdx.x % shares;
    head_and_element = blockIdx.x / shares;
    head = head_and_element / elements;
    kv_head = head / problem.group_size;
    unsigned rest = head_and_element % elements;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int extent = 2 * problem.axes[r].kernel_size - 1;
      index[r] = rest % extent;
      relative[r] = index[r] - (problem.axes[r].kernel_size - 1);
      rest /= extent;
    }
  }

  // Where its share goes among [shares, heads, elements].
  __device__ unsigned long long place(const Problem<kRank>& problem) const {
    return (unsigned long long)share * problem.heads * elements + head_and_element;
  }

  // The key at this relative position, and the offset of its slot; false if the query sees none.
  __device__ bool find_key(const Problem<kRank>& problem, const int (&token)[kRank],
                           int (&key_token)[kRank], int (&offset)[kRank]) const {
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int own = token[r] / axis.dilation, group = token[r] % axis.dilation;
      const Range window = axis.window(own, group);
      const int key_index = own + relative[r] - axis.shift(group);
      if (key_index < window.begin || key_index >= window.end) return false;
      const int key_group = axis.key_group(group), turned = axis.turned(key_index);
      if (Axis::kIsPart && turned >= axis.key_group_length(key_group)) return false;
      key_token[r] = axis.token({key_group, turned});
      offset[r] = key_index - window.begin;
      if (Axis::kIsPart) offset[r] = key_index - axis.unclipped(own, group).begin;
    }
    return true;
  }
};

}  // namespace cuneigh::sums
