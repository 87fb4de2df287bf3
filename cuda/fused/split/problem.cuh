// What the launcher tells the kernels for few queries, and their words:
//
//   row        A query of one head. The query heads that share a key head are rows side by side, so
//              that they see the same keys.
//   box        Of rows: some queries of a dilation group, each in some of those heads. Of keys:
//              Plan::kColumns keys that follow each other in their dilation group.
//   split      The keys that the rows of a box see are cut into `splits` parts, each a number of
//              boxes of keys, and every part is the work of one block.
//   sums       O and the statistics of rows over some of their keys only: O = P V, not divided by
//              anything, m and sum(P), as in cuneigh/warp_softmax.cuh.
#pragma once

#include "cuneigh/window.cuh"

namespace cuneigh::fused::split {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused/split/launch.py.
struct SplitProblem {
  Axis axis;
  int queries;     // of a box of rows
  int heads;       // query heads of a box of rows
  int boxes;       // of queries, those of all dilation groups
  int head_boxes;  // of the query heads that share a key head
  int splits;      // of the keys
  int batch;
  int kv_heads;
  int group_size;  // query heads that share a key head
  int head_dim;
  int value_dim;
  float scale;  // times log2(e)
  int padding;
};
static_assert(sizeof(SplitProblem) == sizeof(Axis) + 48,
              "the record that cuneigh/_backends/fused/split/launch.py packs has this size");

// The sums of all rows over one split after another, where there are several splits.
struct Sums {
  float* output;       // O [splits, batch, queries, heads, value_dim]
  float2* statistics;  // m and sum(P) [splits, batch, queries, heads]
};

}  // namespace cuneigh::fused::split
