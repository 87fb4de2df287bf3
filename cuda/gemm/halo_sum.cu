// Sums the gradients that tiles computed for the keys of their halos: every key adds up the rows of
// the boxes whose queries see it, in a fixed order. Additional keys add up those of all boxes.
//
// One thread for each packet of each key of the pairs (of a batch and a key head) that the chunk
// touches. If a pair has more tiles than a chunk, sums go on from chunk to chunk in `partial`.
// Without `partial` they go on in the target, which has the precision of the sums then. Plan:
// kVector elements move together.

#include "gemm/tiles.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct HaloSumArguments {
  MutableView<Plan> target;                          // [batch, x1..xr, kv_heads, dim]
  MutableView<Plan> additional;                      // [batch, n, kv_heads, dim], or null
  const Accumulator<typename Plan::Element>* halos;  // [tiles, columns, dim]
  Accumulator<typename Plan::Element>* partial;      // [keys + additional, dim], or null
  long long dim;
  long long resume;  // whether partial holds the sums of earlier chunks
  long long finish;  // whether this chunk is the last of the pair
};

// The first box of a dilation group along one axis, as box_begin counts them.
__device__ inline int first_box(const Axis& axis, int group, int size) {
  const int shorter = axis.length / axis.dilation;
  const int longer_groups = axis.length % axis.dilation;
  const int longer = smaller(group, longer_groups);
  return longer * ceil_div(shorter + 1, size) + (group - longer) * ceil_div(shorter, size);
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    halo_sum(const Tiles<Plan::kRank> tiles, const HaloSumArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Numbers = Packet<Number, Plan::kVector>;
  using Elements = Packet<Element, Plan::kVector>;
  constexpr int kRank = Plan::kRank;

  // This thread's pair, key and packet
  const Problem<kRank>& problem = tiles.problem;
  int key_tokens[kRank];
#pragma unroll
  for (int r = 0; r < kRank; ++r) key_tokens[r] = problem.axes[r].key_length;
  const int keys = volume(key_tokens), boxes = volume(problem.boxes);
  const unsigned packets = unsigned(arguments.dim) / Plan::kVector;
  long long rest = blockIdx.x * (long long)Plan::kThreads + threadIdx.x;
  const unsigned packet = rest % packets;
  rest /= packets;
  const int key = int(rest % (keys + problem.additional));
  const long long pair = tiles.first / boxes + rest / (keys + problem.additional);
  const long long first_tile = pair * boxes;
  if (first_tile >= tiles.first + tiles.count) return;
  const int kv_heads = problem.heads / problem.group_size;

  Numbers sum;
#pragma unroll
  for (int e = 0; e < Plan::kVector; ++e) sum.element[e] = 0;

  // dK += one row of one tile, if the tile belongs to this chunk
  bool added = false;
  auto add = [&](long long tile, int column) {
    tile -= tiles.first;
    if (tile < 0 || tile >= tiles.count) return;
    added = true;
    const Numbers term = reinterpret_cast<const Numbers*>(
        arguments.halos)[(tile * tiles.columns + column) * packets + packet];
#pragma unroll
    for (int e = 0; e < Plan::kVector; ++e) sum.element[e] += term.element[e];
  };

  Element* target;
  if (key < keys) {
    const Coordinates<kRank> token(key, Extents<kRank>(key_tokens));
    int first[kRank], count[kRank], group[kRank], index[kRank];
    int total = 1;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      group[r] = token.at[r] % axis.dilation;
      index[r] = token.at[r] / axis.dilation;
      const Range queries = axis.inverse(index[r], group[r]);
      first[r] = queries.begin / problem.box[r];
      const bool is_seen = queries.begin < queries.end;
      count[r] = is_seen ? ceil_div(queries.end, problem.box[r]) - first[r] : 0;
      total *= count[r];
    }
    const Extents<kRank> counts(count);
    for (int i = 0; i < total; ++i) {
      const Coordinates<kRank> which(i, counts);
      int box = 0, column = 0;
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        const Axis& axis = problem.axes[r];
        const int in_group = first[r] + which.at[r];
        const GroupIndex begin = {group[r], in_group * problem.box[r]};
        box = box * problem.boxes[r] + first_box(axis, group[r], problem.box[r]) + in_group;
        column = column * tiles.halo[r] + index[r] - halo_begin(axis, begin, tiles.halo[r]);
      }
      add(first_tile + box, column);
    }
    target = arguments.target.at(int(pair / kv_heads), token.at, int(pair % kv_heads));
  } else {
    const int column = volume(tiles.halo) + key - keys;
    const long long begin = first_tile > tiles.first ? first_tile : tiles.first;
    const long long last = tiles.first + tiles.count;
    const long long end = first_tile + boxes < last ? first_tile + boxes : last;
    for (long long tile = begin; tile < end; ++tile) add(tile, column);
    target = arguments.additional.at(int(pair / kv_heads), int(pair % kv_heads)) +
             (key - keys) * arguments.additional.token[0];
  }

  Numbers* partial = reinterpret_cast<Numbers*>(arguments.partial);
  if (partial) partial += (long long)key * packets + packet;
  const bool moves = partial && arguments.finish;  // from partial to the target
  if (arguments.resume && !added && !moves) return;
  Elements* result = reinterpret_cast<Elements*>(target) + packet;
  if (arguments.resume) {
    Numbers earlier;
    if (partial) {
      earlier = *partial;
    } else {
      const Elements stored = *result;
#pragma unroll
      for (int e = 0; e < Plan::kVector; ++e)
        earlier.element[e] = convert<Number>(stored.element[e]);
    }
#pragma unroll
    for (int e = 0; e < Plan::kVector; ++e) sum.element[e] += earlier.element[e];
  }
  if (partial && !arguments.finish) {
    *partial = sum;
  } else {
    Elements rounded;
#pragma unroll
    for (int e = 0; e < Plan::kVector; ++e) rounded.element[e] = convert<Element>(sum.element[e]);
    *result = rounded;
  }
}

}  // namespace cuneigh::gemm
