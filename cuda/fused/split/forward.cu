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
#include "cuneigh/layout.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "fused/async.cuh"
#include "fused/products.cuh"
#include "fused/split/cluster.cuh"
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
  static constexpr int kWarpSums = Plan::kKeyWarps * sizeof(WarpSums);
  static constexpr int kSumBytes = kWarpSums + kRows * sizeof(float2);

  alignas(16) char memory[kBoxBytes > kSumBytes ? kBoxBytes : kSumBytes];
  Element query[kRows][kVectorPitch<Element, Plan::kHeadDim>];
  Row row[kRows];

  __device__ KeyBox& box(int stage) { return reinterpret_cast<KeyBox*>(memory)[stage]; }
  __device__ WarpSums& sums(int warp) { return reinterpret_cast<WarpSums*>(memory)[warp]; }
  __device__ float4* four(int warp, int row, int d) {
    return reinterpret_cast<float4*>(&sums(warp).output[row][d]);
  }
  // Of the rows over the keys of all warps
  __device__ float2* statistics() { return reinterpret_cast<float2*>(memory + kWarpSums); }
};

// Copies vectors [kDim] to shared memory: source(i) is where vector i lies, or null where zeros
// stand for it, as they do for what lies past `dim`.
template <int kDim, int kThreads, int kVectors, int kPitch, typename Element, typename Source>
__device__ void load_vectors(Element (&vectors_smem)[kVectors][kPitch], int dim, int thread,
                             Source source) {
  constexpr int kChunks = kDim / kChunk<Element>;
#pragma unroll
  for (int i = 0; i < kVectors * kChunks; i += kThreads) {
    const int vector = (i + thread) / kChunks, d = (i + thread) % kChunks * kChunk<Element>;
    if (kVectors * kChunks % kThreads && vector >= kVectors) break;
    const Element* from = source(vector);
    copy_16_bytes<16>(element_of(vectors_smem, vector, d), from + d, from && d < dim ? 16 : 0);
  }
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
  const int given_thread = thread_in_block(), thread = given_thread;
  const Axis& axis = problem.axis;

  // Which rows, and which part of the keys that they see
  unsigned block = blockIdx.x;
  const int split = block % problem.splits;
  block /= problem.splits;
  const int first_head = block % problem.head_boxes * problem.heads;
  block /= problem.head_boxes;
  const GroupIndex first =
      box_begin(axis.dilation, axis.length, block % problem.boxes, problem.queries);
  block /= problem.boxes;
  const int kv_head = block % problem.kv_heads, batch = block / problem.kv_heads;
  const int last = smaller(first.index + problem.queries, axis.group_length(first.group)) - 1;
  // Windows are INCREASING (the contract in cuneigh/_window.py), so that two rows tell all
  const Range of_first = axis.window(first.index, first.group);
  const Range of_last = axis.window(last, first.group);
  const int begin = of_first.begin, end = of_last.end;
  const int boxes = ceil_div(larger(end - begin, 0), kColumns);
  const int first_box = int(static_cast<long long>(boxes) * split / problem.splits);
  const int count = int(static_cast<long long>(boxes) * (split + 1) / problem.splits) - first_box;

  const int head_of_row_0 = kv_head * problem.group_size + first_head;
  for (int r = thread; r < kRows; r += kThreads) {
    const int index = first.index + r / problem.heads;
    const bool exists = index <= last && r / problem.heads < problem.queries &&
                        first_head + r % problem.heads < problem.group_size;
    smem.row[r] = {exists ? axis.token({first.group, index}) : -1,
                   exists ? axis.window(index, first.group) : Range{0, 0}};
  }
  __syncthreads();
  load_vectors<Plan::kHeadDim, kThreads>(
      smem.query, problem.head_dim, thread, [&](int i) -> const Element* {
        const int token = smem.row[i].token;
        return token < 0 ? nullptr
                         : arguments.query.at(batch, {token}, head_of_row_0 + i % problem.heads);
      });

  // Boxes of keys arrive in turn in the stages
  const int key_token = axis.token({axis.key_group(first.group), begin});
  const Element* keys = arguments.key.at(batch, {key_token}, kv_head);
  const Element* values = arguments.value.at(batch, {key_token}, kv_head);
  const long long key_step = arguments.key.token[0] * axis.dilation;
  const long long value_step = arguments.value.token[0] * axis.dilation;
  auto load = [&](int number, int thread) {
    if (number < count) {
      auto& box = smem.box(number % kStages);
      const int start = (first_box + number) * kColumns, left = end - begin - start;
      load_vectors<Plan::kHeadDim, kThreads>(
          box.key, problem.head_dim, thread, [&](int i) -> const Element* {
            return i < left ? keys + (start + i) * key_step : nullptr;
          });
      load_vectors<Plan::kValueDim, kThreads>(
          box.value, problem.value_dim, thread, [&](int i) -> const Element* {
            return i < left ? values + (start + i) * value_step : nullptr;
          });
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i, thread);

  // Rows lane / 4 and lane / 4 + 8 of every 16 are a thread's, in columns 2 * (lane % 4) and the
  // one after of every 8 keys or dimensions
  auto place_of = [](int thread) {
    const int warp = thread / 32;
    return Place{thread % 32, warp % Plan::kRowWarps * kRowTiles * 16, warp / Plan::kRowWarps};
  };
  const float scale = problem.scale;
  float output_rmem[kRowTiles][Plan::kValueDim / 8][4] = {};
  WarpSoftmax<kRowTiles> softmax;
  for (int number = 0; number < count; ++number) {
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const auto& box = smem.box(number % kStages);
    const auto [lane, warp_row, key_warp] = place_of(forgotten(given_thread));
    const int first_column = key_warp * kWarpColumns;

    // S = Q K^T
    float logit_rmem[kRowTiles][kColumnTiles][4] = {};
    gemm_nt<Plan::kHeadDim>(&smem.query[warp_row], &box.key[first_column], lane, logit_rmem);

    load(number + kStages - 1, forgotten(given_thread));

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
      const float sum = softmax.sum(m, half);
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
#pragma unroll 2
  for (int i = thread; i < kRows * kFours; i += kThreads) {
    const int r = i / kFours, d = i % kFours * 4;
    const int token = smem.row[r].token, head = head_of_row_0 + r % problem.heads;
    if (token < 0 || d >= problem.value_dim) continue;
    Joined joined;
#pragma unroll
    for (int w = 0; w < Plan::kKeyWarps; ++w) joined.see(smem.sums(w).statistics[r]);
#pragma unroll
    for (int w = 0; w < Plan::kKeyWarps; ++w)
      joined.add(smem.sums(w).statistics[r], *smem.four(w, r, d));
    const float2 statistics = {joined.row_max, joined.row_sum};
    if constexpr (Plan::kCluster > 1) {
      *smem.four(0, r, d) = joined.output;
      if (d == 0) smem.statistics()[r] = statistics;
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
    // O of each row over the keys of all blocks of the cluster, which take their shares of it
    cluster_sync();
    for (int i = split * kThreads + thread; i < kRows * kFours; i += Plan::kCluster * kThreads) {
      const int r = i / kFours, d = i % kFours * 4;
      const int token = smem.row[r].token, head = head_of_row_0 + r % problem.heads;
      if (token < 0 || d >= problem.value_dim) continue;
      float2 statistics[Plan::kCluster];
      float4 output[Plan::kCluster];
#pragma unroll
      for (int b = 0; b < Plan::kCluster; ++b) {
        statistics[b] = in_block(b, &smem.statistics()[r]);
        output[b] = in_block(b, smem.four(0, r, d));
      }
      Joined joined;
#pragma unroll
      for (int b = 0; b < Plan::kCluster; ++b) joined.see(statistics[b]);
#pragma unroll
      for (int b = 0; b < Plan::kCluster; ++b) joined.add(statistics[b], output[b]);
      store(joined, token, head, d);
    }
    cluster_sync();  // no block goes while others read its memory
  }
}

}  // namespace cuneigh::fused::split
