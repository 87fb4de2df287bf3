// Neighborhood attention of few queries along one axis, such as those of a decoder beside a cache
// of keys: as fast as the keys can be read. problem.cuh defines the words.
//
// The rows of a block are all query heads that share a key head, so that every key is read once for
// all of them, and there are blocks for all parts of the keys. A block goes over boxes of keys, of
// which some are always on their way to shared memory. Of each box every warp multiplies its rows
// with its share of the keys; the sums of warps that have other keys of the same rows are joined in
// the end. Where there are several splits, the blocks of a cluster join their sums, or join.cu
// does.
//
// blockIdx.x: (element of the batch, key head, box of queries, box of query heads, split).
//
// struct Plan {
//   static constexpr int kRank;                 1
//   static constexpr int kRowTiles;             sixteens of rows of a warp
//   static constexpr int kRowWarps, kKeyWarps;  warps with other rows; with other keys of a box
//   static constexpr int kColumns;              keys of a box; each warp has a multiple of 16
//   static constexpr int kStages;               boxes of keys in shared memory
//   static constexpr int kBlocks;               blocks of a multiprocessor to leave registers for
//   static constexpr int kCluster;              blocks of a cluster, which join their sums: the
//                                               number of splits, or 1
//   static constexpr int kHeadDim, kValueDim;   head dimensions, padded to multiples of 16
//   static constexpr int kSharedBytes;          of Smem, as the launcher counts them
//   using Element;                              float16 or bfloat16
// };

#include "cuneigh/boxes.cuh"
#include "cuneigh/cluster.cuh"
#include "cuneigh/layout.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "fused/async.cuh"
#include "fused/products.cuh"
#include "fused/split/problem.cuh"
#include "fused/split/results.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::split {

template <typename Plan>
struct ForwardArguments {
  View<const typename Plan::Element, 1> query, key, value;
  View<typename Plan::Element, 1> output;
  View<float, 1> lse;  // may be null
  Sums sums;           // null where there is one split
};

// A thread's lane, the first row of its warp, and which keys of each box its warp has.
struct Place {
  int lane, warp_row, key_warp;
};

template <typename Plan>
struct Smem {
  using Element = typename Plan::Element;
  static constexpr int kWarps = Plan::kRowWarps * Plan::kKeyWarps;
  static constexpr int kWarpRows = Plan::kRowTiles * 16;
  static constexpr int kRows = Plan::kRowWarps * kWarpRows;
  static constexpr int kSumPitch = Plan::kValueDim + 8;  // of which two rows lie in other banks
  struct KeyBox {
    Element key[Plan::kColumns][kVectorPitch<Element, Plan::kHeadDim>];
    Element value[Plan::kColumns][kVectorPitch<Element, Plan::kValueDim>];
  };
  struct WarpSums {  // of the rows over the keys of some warps
    float output[kRows][kSumPitch];
    float2 statistics[kRows];  // m and sum(P)
  };
  static constexpr int kBoxBytes = Plan::kStages * sizeof(KeyBox);
  static constexpr int kSumBytes = Plan::kKeyWarps * sizeof(WarpSums);
  static constexpr int kBytes = kBoxBytes > kSumBytes ? kBoxBytes : kSumBytes;
  struct BlockSums {  // of a row over the keys of each block of the cluster
    float4 output[Plan::kCluster][Plan::kValueDim / 4];
    float2 statistics[Plan::kCluster];
  };
  static constexpr int kOwned = kRows / Plan::kCluster;  // rows whose sums this block joins
  static constexpr int kOwnedBytes = Plan::kCluster > 1 ? kOwned * sizeof(BlockSums) : 0;

  alignas(16) char memory[kBytes + kOwnedBytes];
  Element query[kRows][kVectorPitch<Element, Plan::kHeadDim>];
  Row row[kRows];

  __device__ KeyBox& box(int stage) { return reinterpret_cast<KeyBox*>(memory)[stage]; }
  __device__ WarpSums& sums(int warp) { return reinterpret_cast<WarpSums*>(memory)[warp]; }
  __device__ float4* four(int warp, int row, int d) {
    return reinterpret_cast<float4*>(&sums(warp).output[row][d]);
  }
  __device__ BlockSums& owned(int i) { return reinterpret_cast<BlockSums*>(memory + kBytes)[i]; }
};

// Copies kVectors vectors [kDim] to shared memory: `first` and those that follow it every `step`
// elements. Zeros stand for all but the first `count`, and for what lies past `dim`.
template <int kDim, int kVectors, int kThreads, int kPitch, typename Element>
__device__ void load_vectors(Element (*vectors_smem)[kPitch], int dim, int thread,
                             const Element* first, long long step, int count) {
  constexpr int kChunks = kDim / kChunk<Element>, kAtOnce = kThreads / kChunks;
  const int start = thread / kChunks, d = thread % kChunks * kChunk<Element>;
  if (kThreads % kChunks && start >= kAtOnce) return;
  const Element* from = first + start * step + d;
#pragma unroll
  for (int i = 0; i < kVectors; i += kAtOnce, from += kAtOnce * step) {
    const int vector = start + i;
    if (kVectors % kAtOnce && vector >= kVectors) break;
    copy_16_bytes<16>(element_of(vectors_smem, vector, d), from,
                      vector < count && d < dim ? 16 : 0);
  }
}

// Waits for the warps that have the same keys as this one.
template <typename Plan>
__device__ void sync_team(int team) {
  if constexpr (Plan::kRowWarps == 1)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(Plan::kRowWarps * 32) : "memory");
}

// Takes the last digit off a number, and returns it. (A division takes a GPU longer than the
// questions whether it is needed.)
__device__ inline int last_digit(unsigned& number, unsigned radix) {
  if (radix == 1) return 0;
  const unsigned rest = number < radix ? 0 : number / radix, digit = number - rest * radix;
  number = rest;
  return digit;
}

template <typename Plan>
__global__ void __launch_bounds__(Smem<Plan>::kWarps * 32, Plan::kBlocks)
    CUNEIGH_CLUSTER(Plan::kCluster)
        forward(const SplitProblem problem, const ForwardArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kRowTiles = Plan::kRowTiles, kColumns = Plan::kColumns, kStages = Plan::kStages;
  constexpr int kWarpColumns = kColumns / Plan::kKeyWarps, kColumnTiles = kWarpColumns / 8;
  constexpr int kRows = Smem<Plan>::kRows, kThreads = Smem<Plan>::kWarps * 32;
  static_assert(sizeof(ForwardArguments<Plan>) == 5 * sizeof(View<float, 1>) + sizeof(Sums),
                "`launch` in cuneigh/_backends/fused/split/launch.py packs these");
  static_assert(sizeof(Smem<Plan>) == Plan::kSharedBytes,
                "`shared_bytes` in cuneigh/_backends/fused/split/plan.py counts what Smem holds");
  auto& smem = dynamic_smem<Smem<Plan>>();
  if constexpr (Plan::kCluster > 1) cluster_arrive();
  const int given_thread = thread_in_block(), thread = given_thread;
  const Axis& axis = problem.axis;

  // Which rows, and what they see
  unsigned block = blockIdx.x;
  const int splits = Plan::kCluster > 1 ? Plan::kCluster : problem.splits;
  const int split = last_digit(block, splits);
  const int first_head = last_digit(block, problem.head_boxes) * problem.heads;
  const GroupIndex first =
      box_begin(axis.dilation, axis.length, last_digit(block, problem.boxes), problem.queries);
  const int kv_head = last_digit(block, problem.kv_heads), batch = block;
  const int queries = smaller(problem.queries, axis.group_length(first.group) - first.index);
  static_assert(kRows <= kThreads, "a thread takes a row");
  if (thread < kRows) {
    const int query = thread / problem.heads, head = first_head + thread - query * problem.heads;
    const bool exists = query < queries && head < problem.group_size;
    const int index = first.index + query;
    smem.row[thread] = {exists ? axis.token({first.group, index}) : -1,
                        kv_head * problem.group_size + head,
                        exists ? axis.window(index, first.group) : Range{0, 0}};
  }
  __syncthreads();

  // Which part of the keys that they see. Windows are INCREASING (the contract in
  // cuneigh/_window.py), so that two rows tell all.
  const Range of_first = smem.row[0].window;
  const Range of_last = smem.row[(queries - 1) * problem.heads].window;
  const int begin = of_first.begin, end = of_last.end;
  const int boxes = ceil_div(larger(end - begin, 0), kColumns);
  const int least = boxes / splits, more = boxes - least * splits;  // the first have one more
  const int first_box = split * least + smaller(split, more);
  const int count = least + (split < more);

  // Boxes of keys arrive in turn in the stages. The warps that have the same keys of each bring
  // them, and wait for no others.
  constexpr int kTeam = Plan::kRowWarps * 32;
  const int team = thread / kTeam;
  const int first_key = first_box * kColumns + team * kWarpColumns,
            given_keys = end - begin - first_key;
  const int key_token = axis.token({axis.key_group(first.group), begin + first_key});
  const Element* keys = arguments.key.at(batch, {key_token}, kv_head);
  const Element* values = arguments.value.at(batch, {key_token}, kv_head);
  const long long key_step = arguments.key.token[0] * axis.dilation;
  const long long value_step = arguments.value.token[0] * axis.dilation;
  auto load = [&](int number, int thread) {
    if (number >= count) return;
    auto& box = smem.box(number % kStages);
    const int start = number * kColumns, left = given_keys - start;
    const int first_column = thread / kTeam * kWarpColumns, of_team = thread % kTeam;
    load_vectors<Plan::kHeadDim, kWarpColumns, kTeam>(
        &box.key[first_column], problem.head_dim, of_team, keys + start * key_step, key_step, left);
    load_vectors<Plan::kValueDim, kWarpColumns, kTeam>(&box.value[first_column], problem.value_dim,
                                                       of_team, values + start * value_step,
                                                       value_step, left);
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) {
    load(i, thread);
    if (i == 0) {
      constexpr int kChunks = Plan::kHeadDim / kChunk<Element>;
#pragma unroll 1
      for (int j = thread; j < kRows * kChunks; j += kThreads) {
        const int r = j / kChunks, d = j % kChunks * kChunk<Element>;
        const auto [token, head, window] = smem.row[r];
        copy_16_bytes<16>(element_of(smem.query, r, d),
                          arguments.query.at(batch, {token}, head) + d,
                          token >= 0 && d < problem.head_dim ? 16 : 0);
      }
    }
    cp_async_commit();
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are a thread's, in columns 2 * (lane % 4) and the
  // one after of every 8 keys or dimensions
  auto place_of = [](int thread) {
    const int warp = thread / 32;
    return Place{thread % 32, warp % Plan::kRowWarps * kRowTiles * 16, warp / Plan::kRowWarps};
  };
  const float scale = problem.scale;
  float output_rmem[kRowTiles][Plan::kValueDim / 8][4] = {};
  WarpSoftmax<kRowTiles> softmax;
  cp_async_wait<kStages - 2>();  // queries have arrived
  __syncthreads();
  for (int number = 0; number < count; ++number) {
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    cp_async_wait<kStages - 2>();
    sync_team<Plan>(team);
    const auto& box = smem.box(number % kStages);
    const auto [lane, warp_row, key_warp] = place_of(forgotten(given_thread));
    const int first_column = key_warp * kWarpColumns;

    // S = Q K^T
    float logit_rmem[kRowTiles][kColumnTiles][4] = {};
    gemm_nt<Plan::kHeadDim>(&smem.query[warp_row], &box.key[first_column], lane, logit_rmem);

    load(number + kStages - 1, forgotten(given_thread));
    cp_async_commit();

    // S = -inf outside of windows
    const int start = begin + (first_box + number) * kColumns;
    if (start < of_last.begin || start + kColumns > of_first.end) {
      const int column = start + first_column + lane % 4 * 2;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Range window = smem.row[warp_row + m * 16 + half * 8 + lane / 4].window;
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int key = column + n * 8 + i;
              if (key < window.begin || key >= window.end)
                logit_rmem[m][n][2 * half + i] = -infinity<float>();
            }
        }
    }

    // O += P V
    softmax.rescale(logit_rmem, scale, output_rmem);
    softmax.exponentiate(logit_rmem, scale);
    gemm_nn<Plan::kValueDim>(logit_rmem, &box.value[first_column], lane, output_rmem);
  }

  // The sums of all warps lie where the boxes lay
  cp_async_wait<0>();
  __syncthreads();
  const auto [lane, warp_row, key_warp] = place_of(forgotten(given_thread));
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      const float sum = softmax.sum(m, half);  // of all lanes
      if (smem.row[row].token < 0) continue;
      if (lane % 4 == 0) smem.sums(key_warp).statistics[row] = {softmax.row_max[m][half], sum};
      float* target = &smem.sums(key_warp).output[row][lane % 4 * 2];
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
        *reinterpret_cast<float2*>(target + d * 8) = {output_rmem[m][d][2 * half],
                                                      output_rmem[m][d][2 * half + 1]};
    }
  __syncthreads();

  // O of each row over the keys of all warps, four dimensions a thread
  constexpr int kFours = Plan::kValueDim / 4;
  const int all_heads = problem.kv_heads * problem.group_size;
  auto store = [&](const Joined& joined, int token, int head, int d) {
    joined.store(arguments.output.at(batch, {token}, head) + d);
    if (d == 0 && arguments.lse.data) *arguments.lse.at(batch, {token}, head) = joined.lse();
  };
  if constexpr (Plan::kCluster > 1) cluster_wait();
#pragma unroll 2
  for (int i = thread; i < kRows * kFours; i += kThreads) {
    const int r = i / kFours, d = i % kFours * 4;
    const auto [token, head, window] = smem.row[r];
    if (token < 0 || d >= problem.value_dim) continue;
    Joined joined;
#pragma unroll
    for (int w = 0; w < Plan::kKeyWarps; ++w) joined.see(smem.sums(w).statistics[r]);
#pragma unroll
    for (int w = 0; w < Plan::kKeyWarps; ++w)
      joined.add(smem.sums(w).statistics[r], *smem.four(w, r, d));
    const float2 statistics = {joined.row_max, joined.row_sum};
    if constexpr (Plan::kCluster > 1) {
      const int owner = r % Plan::kCluster;
      auto& sums = smem.owned(r / Plan::kCluster);
      put(owner, &sums.output[split][d / 4], joined.output);
      if (d == 0) put(owner, &sums.statistics[split], statistics);
    } else if (problem.splits == 1) {
      store(joined, token, head, d);
    } else {
      const long long at =
          ((static_cast<long long>(split) * problem.batch + batch) * axis.length + token) *
              all_heads +
          head;
      *reinterpret_cast<float4*>(arguments.sums.output + at * problem.value_dim + d) =
          joined.output;
      if (d == 0) arguments.sums.statistics[at] = statistics;
    }
  }
  if constexpr (Plan::kCluster > 1) {
    // O of each row over the keys of all blocks of the cluster, which take turns at rows
    cluster_sync();
    for (int i = thread; i < Smem<Plan>::kOwned * kFours; i += kThreads) {
      const int d = i % kFours * 4;
      const auto [token, head, window] = smem.row[i / kFours * Plan::kCluster + split];
      if (token < 0 || d >= problem.value_dim) continue;
      const auto& sums = smem.owned(i / kFours);
      Joined joined;
#pragma unroll
      for (int b = 0; b < Plan::kCluster; ++b) joined.see(sums.statistics[b]);
#pragma unroll
      for (int b = 0; b < Plan::kCluster; ++b)
        joined.add(sums.statistics[b], sums.output[b][d / 4]);
      store(joined, token, head, d);
    }
  }
}

}  // namespace cuneigh::fused::split
