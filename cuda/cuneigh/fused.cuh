// What the fused kernels share: the boxes that a block works on, their tables in shared memory, and
// the copies between global and shared memory.
#pragma once

#include "cuneigh/async.cuh"
#include "cuneigh/boxes.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"

namespace cuneigh {

// Everything that no array says. Its twin is `_record` in cuneigh/_backends/fused.py.
template <int kRank>
struct FusedProblem {
  Axis axes[kRank];
  int warp_box[kRank];  // queries of a warp along each axis
  int warps[kRank];     // warps of a block along each axis
  int key_box[kRank];   // keys of a box along each axis
  int boxes[kRank];     // query boxes along each axis, those of all dilation groups
  int batch;
  int heads;
  int group_size;  // query heads that share a key head
  int head_dim;
  int value_dim;
  int additional;  // number of additional keys
  int sign;        // of the scale: 1, 0 or -1
  float scale;     // its magnitude; 1 where the sign is 0
};

template <typename Plan>
struct FusedForward {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<const typename Plan::Element, Plan::kRank> additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
};

// Rows of an odd number of 16-byte chunks: eight rows at the same chunk hit different banks.
constexpr int padded(int dim) { return dim / 8 % 2 ? dim : dim + 8; }

// Steps from the first key of a box to one of the others in the memory of key, value and rpb.
struct KeyPlace {
  long long key, value;
  int bias;
};

// The queries of a block.
template <int kRank>
struct QueryBox {
  int batch, head;
  Place first[kRank];  // dilation group and first group index
};

template <int kRank>
__device__ QueryBox<kRank> query_box(const FusedProblem<kRank>& problem) {
  QueryBox<kRank> box;
  unsigned block = blockIdx.x;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int size = problem.warp_box[r] * problem.warps[r];
    box.first[r] = box_place(problem.axes[r], block % problem.boxes[r], size);
    block /= problem.boxes[r];
  }
  box.head = block % problem.heads;
  box.batch = block / problem.heads;
  return box;
}

template <typename Plan>
struct FusedSmem {
  using Element = typename Plan::Element;
  static constexpr int kQueries = Plan::kWarps * Plan::kRowTiles * 16;
  static constexpr int kQueryDim =
      Plan::kHeadDim > Plan::kValueDim ? Plan::kHeadDim : Plan::kValueDim;

  Element query[kQueries][padded(kQueryDim)];  // in the end the output
  Element key[2][Plan::kKeys][padded(Plan::kHeadDim)];
  Element value[2][Plan::kKeys][padded(Plan::kValueDim)];
  unsigned long long before[Plan::kRank][Plan::kKeys + 1];  // bits of the keys of a box whose
                                                            // coordinate is less than an index
  KeyPlace place[Plan::kKeys];
  Range reach[Plan::kRank];                // keys that the block sees
  Sight sight[Plan::kWarps][Plan::kRank];  // keys that every warp sees
  Range window[kQueries][Plan::kRank];     // empty for a row without a query
  int query_token[kQueries][Plan::kRank];  // -1 for a row without a query
  int bias[kQueries];                      // step in rpb
};

// The keys that at least one query of the box sees along axis r.
template <int kRank>
__device__ Range reach_of(const FusedProblem<kRank>& problem, const QueryBox<kRank>& box, int r) {
  const Axis& axis = problem.axes[r];
  const auto [group, first] = box.first[r];
  const int size = problem.warp_box[r] * problem.warps[r];
  const int last = smaller(first + size, axis.group_length(group)) - 1;
  return {axis.window(first, group).begin, axis.window(last, group).end};
}

// A box of keys: of the window, or of the additional keys.
template <int kRank>
struct KeyBox {
  int begin[kRank];           // group indices; the first key of a box of additional keys
  unsigned long long exists;  // as bits, the keys that any query of the block may see
  bool additional;
};

// Sets `exists` of a box of keys.
template <typename Plan>
__device__ void bound(const FusedProblem<Plan::kRank>& problem, const FusedSmem<Plan>& smem,
                      KeyBox<Plan::kRank>& keys) {
  keys.exists = ~0ull;
  if (keys.additional) {
    const int left = problem.additional - keys.begin[0];
    if (left < 64) keys.exists >>= 64 - left;
    return;
  }
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r)
    keys.exists &= smem.before[r][smaller(smem.reach[r].end - keys.begin[r], problem.key_box[r])];
}

// The first box of keys. Those that cover the reach of the block come in raster order, then those
// of the additional keys.
template <typename Plan>
__device__ KeyBox<Plan::kRank> first_keys(const FusedProblem<Plan::kRank>& problem,
                                          const FusedSmem<Plan>& smem) {
  KeyBox<Plan::kRank> keys;
  keys.additional = false;
#pragma unroll
  for (int r = 0; r < Plan::kRank; ++r) keys.begin[r] = smem.reach[r].begin;
  bound<Plan>(problem, smem, keys);
  return keys;
}

// Moves on to the next box of keys; false after the last.
template <typename Plan>
__device__ bool advance(const FusedProblem<Plan::kRank>& problem, const FusedSmem<Plan>& smem,
                        KeyBox<Plan::kRank>& keys) {
  if (keys.additional) {
    keys.begin[0] += Plan::kKeys;
  } else {
    int r = Plan::kRank - 1;
#pragma unroll
    for (int axis = Plan::kRank - 1; axis >= 0; --axis) {
      if (r == axis) {
        keys.begin[axis] += problem.key_box[axis];
        if (keys.begin[axis] >= smem.reach[axis].end) {
          keys.begin[axis] = smem.reach[axis].begin;
          r = axis - 1;
        }
      }
    }
    if (r < 0) {
      keys.additional = true;
      keys.begin[0] = 0;
    }
  }
  if (keys.additional && keys.begin[0] >= problem.additional) return false;
  bound<Plan>(problem, smem, keys);
  return true;
}

// Fills everything in shared memory that does not depend on the box of keys.
template <typename Plan>
__device__ void fill_tables(const FusedProblem<Plan::kRank>& problem,
                            const FusedForward<Plan>& arguments, const QueryBox<Plan::kRank>& box,
                            FusedSmem<Plan>& smem) {
  constexpr int kRank = Plan::kRank, kThreads = Plan::kWarps * 32;
  constexpr int kWarpRows = Plan::kRowTiles * 16;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int r = 0; r < kRank; ++r) smem.reach[r] = reach_of(problem, box, r);
  }

  // Queries: every warp takes a box of its own
  for (int row = threadIdx.x; row < FusedSmem<Plan>::kQueries; row += kThreads) {
    int in_warp = row % kWarpRows, warp = row / kWarpRows;
    bool exists = true;
    int index[kRank];
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int inside = r == 0 ? in_warp : in_warp % problem.warp_box[r];
      index[r] = box.first[r].index + warp % problem.warps[r] * problem.warp_box[r] + inside;
      exists &= inside < problem.warp_box[r] &&
                index[r] < problem.axes[r].group_length(box.first[r].group);
      in_warp /= problem.warp_box[r];
      warp /= problem.warps[r];
    }
    long long bias = 0;
#pragma unroll
    for (int r = 0; r < kRank; ++r) {
      const Axis& axis = problem.axes[r];
      const int group = box.first[r].group;
      smem.query_token[row][r] = exists ? axis.token({group, index[r]}) : -1;
      smem.window[row][r] = exists ? axis.window(index[r], group) : Range{0, 0};
      bias += (axis.kernel_size - 1 - index[r]) * arguments.rpb.token[r];
    }
    smem.bias[row] = int(bias);
  }

  // Keys: a box in raster order; places past its end are seen by no query
  for (int place = threadIdx.x; place < Plan::kKeys; place += kThreads) {
    int rest = place;
    long long key = 0, value = 0, bias = 0;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const int coordinate = r == 0 ? rest : rest % problem.key_box[r];
      rest /= problem.key_box[r];
      const long long tokens = (long long)coordinate * problem.axes[r].dilation;
      key += tokens * arguments.key.token[r];
      value += tokens * arguments.value.token[r];
      bias += coordinate * arguments.rpb.token[r];
    }
    smem.place[place].key = key;
    smem.place[place].value = value;
    smem.place[place].bias = int(bias);
  }
  __syncthreads();

  // What the queries of every warp see together
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    Sight sight = Sight::nothing();
    for (int row = warp * kWarpRows + lane; row < (warp + 1) * kWarpRows; row += 32)
      if (smem.query_token[row][0] >= 0) sight.add(smem.window[row][r]);
    sight = sight.of_warp();
    if (lane == 0) smem.sight[warp][r] = sight;
  }
  // In raster order an axis repeats its pattern for every coordinate of the axes before it
  int inner = 1;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int period = inner * problem.key_box[r];
    int area = 1;
#pragma unroll
    for (int other = 0; other < kRank; ++other) area *= problem.key_box[other];
    for (int index = threadIdx.x; index <= problem.key_box[r]; index += kThreads) {
      const int bits = index * inner;
      const unsigned long long pattern = bits < 64 ? (1ull << bits) - 1 : ~0ull;
      unsigned long long before = 0;
      for (int start = 0; start < area; start += period) before |= pattern << start;
      smem.before[r][index] = before;
    }
    inner = period;
  }
}

// Copies the rows of a box of keys or values; zeros stand for keys that nobody sees. `kStep` names
// the member of KeyPlace that leads from key to key of a window; kExact promises dim == kDim.
template <int kDim, int kBytes, bool kExact, auto kStep, typename Plan, typename Element>
__device__ void load_keys(const FusedProblem<Plan::kRank>& problem, const KeyBox<Plan::kRank>& keys,
                          const View<const Element, Plan::kRank>& window,
                          const View<const Element, Plan::kRank>& additional, int dim,
                          const QueryBox<Plan::kRank>& box, int kv_head,
                          const FusedSmem<Plan>& smem, Element (*rows_smem)[padded(kDim)]) {
  constexpr int kThreads = Plan::kWarps * 32, kChunks = kDim / 8;
  const Element* first_key;
  if (keys.additional) {
    first_key = additional.at(box.batch, kv_head) + keys.begin[0] * additional.token[0];
  } else {
    first_key = window.at(box.batch, kv_head);
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      first_key += problem.axes[r].token({box.first[r].group, keys.begin[r]}) * window.token[r];
  }
#pragma unroll
  for (int start = 0; start < Plan::kKeys * kChunks; start += kThreads) {
    const int i = start + threadIdx.x;
    if (Plan::kKeys * kChunks % kThreads && i >= Plan::kKeys * kChunks) break;
    const int row = i / kChunks, first = i % kChunks * 8;
    const long long step = keys.additional ? row * additional.token[0] : smem.place[row].*kStep;
    const int valid = kExact ? 16 : (dim - first) * 2;
    copy_16_bytes<kBytes>(&rows_smem[row][first], first_key + step + first,
                          keys.exists >> row & 1 ? valid : 0);
  }
}

template <typename Plan>
__device__ void load_queries(const FusedProblem<Plan::kRank>& problem,
                             const View<const typename Plan::Element, Plan::kRank>& view,
                             const QueryBox<Plan::kRank>& box, FusedSmem<Plan>& smem) {
  constexpr int kThreads = Plan::kWarps * 32, kChunks = Plan::kHeadDim / 8;
#pragma unroll 4
  for (int i = threadIdx.x; i < FusedSmem<Plan>::kQueries * kChunks; i += kThreads) {
    const int row = i / kChunks, first = i % kChunks * 8;
    const auto& token = smem.query_token[row];
    const bool exists = token[0] >= 0;
    const auto* source = view.at(box.batch, token, box.head) + first;
    copy_16_bytes<Plan::kKeyBytes>(&smem.query[row][first], source,
                                   exists ? (problem.head_dim - first) * 2 : 0);
  }
}

// Gives a warp's queries the sign of the scale, so that the scale itself is positive.
template <typename Plan>
__device__ void sign_queries(const FusedProblem<Plan::kRank>& problem, FusedSmem<Plan>& smem,
                             int warp, int lane) {
  if (problem.sign == 1) return;
  constexpr int kRows = Plan::kRowTiles * 16;
  for (int i = lane; i < kRows * Plan::kHeadDim; i += 32) {
    auto& element = smem.query[warp * kRows + i / Plan::kHeadDim][i % Plan::kHeadDim];
    element = convert<typename Plan::Element>(float(problem.sign) * convert<float>(element));
  }
  __syncwarp();
}

enum class Visibility { kNone, kSome, kAll };

// How much of a box of keys a warp sees.
template <typename Plan>
__device__ Visibility visibility_of(const FusedProblem<Plan::kRank>& problem,
                                    const KeyBox<Plan::kRank>& keys, const FusedSmem<Plan>& smem,
                                    int warp) {
  bool all = keys.exists << (64 - Plan::kKeys) == ~0ull << (64 - Plan::kKeys);
  if (!keys.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Sight sight = smem.sight[warp][r];
      const int end = keys.begin[r] + problem.key_box[r];
      if (sight.misses(keys.begin[r], end)) return Visibility::kNone;
      all &= sight.covers(keys.begin[r], end);
    }
  }
  return all ? Visibility::kAll : Visibility::kSome;
}

// The keys of a box that a query sees, as bits, shifted so that this lane's first column is bit 0.
template <typename Plan>
__device__ unsigned long long visible_keys(const FusedProblem<Plan::kRank>& problem,
                                           const KeyBox<Plan::kRank>& keys,
                                           const FusedSmem<Plan>& smem, int row, int lane) {
  unsigned long long visible = keys.exists;
  if (!keys.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) {
      const Range window = smem.window[row][r];
      const int size = problem.key_box[r];
      const int begin = smaller(larger(window.begin - keys.begin[r], 0), size);
      const int end = smaller(larger(window.end - keys.begin[r], 0), size);
      visible &= smem.before[r][end] & ~smem.before[r][begin];
    }
  }
  return visible >> (lane % 4 * 2);
}

// Scales a row's logits to base 2 and adds the bias.
template <typename Plan>
__device__ void add_bias(const FusedProblem<Plan::kRank>& problem,
                         const View<const typename Plan::Bias, Plan::kRank>& rpb,
                         const QueryBox<Plan::kRank>& box, const KeyBox<Plan::kRank>& keys,
                         const FusedSmem<Plan>& smem, int row, int half, int lane, float scale,
                         unsigned long long visible, float (&logit)[Plan::kKeys / 8][4]) {
  constexpr float kLog2E = 1.44269504f;
  long long origin = smem.bias[row];
  if (!keys.additional) {
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r) origin += keys.begin[r] * rpb.token[r];
  }
#pragma unroll
  for (int n = 0; n < Plan::kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& x = logit[n][2 * half + i];
      x *= scale;
      if (!keys.additional && (visible >> (n * 8 + i) & 1))
        x += kLog2E * convert<float>(*(rpb.at(0, box.head) + origin +
                                       smem.place[n * 8 + i + lane % 4 * 2].bias));
    }
}

// Writes a warp's rows of output from shared memory, whole chunks where the alignment allows.
template <typename Plan>
__device__ void store_rows(const FusedProblem<Plan::kRank>& problem,
                           const View<typename Plan::Element, Plan::kRank>& view,
                           const QueryBox<Plan::kRank>& box, const FusedSmem<Plan>& smem, int warp,
                           int lane) {
  constexpr int kRows = Plan::kRowTiles * 16, kWidth = Plan::kValueBytes / 2;
  constexpr int kPackets = Plan::kValueDim / kWidth;
  struct alignas(Plan::kValueBytes) Packet {
    typename Plan::Element element[kWidth];
  };
#pragma unroll 4
  for (int i = lane; i < kRows * kPackets; i += 32) {
    const int row = warp * kRows + i / kPackets, first = i % kPackets * kWidth;
    const auto& token = smem.query_token[row];
    if (token[0] >= 0 && first < problem.value_dim)
      *reinterpret_cast<Packet*>(view.at(box.batch, token, box.head) + first) =
          *reinterpret_cast<const Packet*>(&smem.query[row][first]);
  }
}

}  // namespace cuneigh
