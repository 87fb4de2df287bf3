// The forward pass of attention on Hopper's tensor cores for a chunk of queries, such as decoders
// have beside a cache of keys: output and lse. chunk.cuh says how it is cut.
//
// A block has two warpgroups of consumers and a warp that loads. The former have the same queries,
// so that they see the same boxes of keys, which fill all memory that queries leave: keys come from
// memory, not from the L2 cache. A warpgroup is held up while its products are under way, all but
// the last, so that the tensor cores work for one while the other is at its exponentials. These
// must take no longer than the products do.
//
// Where there are fewer tiles than multiprocessors, the blocks of a cluster share the boxes of one,
// and join what they have in the end (chunk_shares.cuh).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/chunk.cuh"
#include "hopper/chunk_shares.cuh"
#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"
#include "hopper/products.cuh"
#include "hopper/results.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct ChunkArguments {
  View<typename Plan::Element, 1> output;
  View<float, 1> lse;  // may be null
};

// Loads a box of tokens from `token` on.
template <typename Line, int kLines, int kTokens>
__device__ void load_vectors(const TensorMap& map, const Walk& walk, int head, int token,
                             const Pieces& pieces, Line (&lines)[kLines][kTokens], Barrier& full) {
  load_tokens<kLines, 1>(map, {{}, walk.batch, head, {token}}, pieces, lines, full);
}

// Makes the barrier of the queries, which this thread waits for like everybody else, and loads
// them.
template <typename Plan>
__device__ void load_queries(const HopperProblem<1>& problem, const TensorMap& query,
                             const Walk& walk, ChunkMemory<Plan>& smem) {
  smem.query_full.init(1);
  fence_barrier_init();
  smem.query_full.arrive_and_expect(sizeof(smem.query));
  const int token = axis_of<Plan>(problem, 0).token({walk.group, 0});
#pragma unroll 1
  for (int w = 0; w < Plan::kWarpgroups; ++w)
    load_vectors(query, walk, walk.head + w, token, problem.row_pieces, smem.query[w],
                 smem.query_full);
}

template <typename Plan>
__device__ void make_key_barriers(ChunkMemory<Plan>& smem) {
  smem.shares_full.init(1);
  for (int w = 0; w < Plan::kWarpgroups; ++w) smem.turn[w].init(0, 4);
#pragma unroll
  for (int i = 0; i < Plan::kStages; ++i) {
    smem.key_full[i].init(1);
    smem.value_full[i].init(1);
    smem.key_empty[i].init(0, 4 * Plan::kWarpgroups);
    smem.value_empty[i].init(0, 4 * Plan::kWarpgroups);
  }
  fence_barrier_init();
}

// Loads the keys and values of boxes from `begin` to before `end`.
template <typename Plan>
__device__ void load_keys(const HopperProblem<1>& problem, const TensorMap& key,
                          const TensorMap& value, const Walk& walk, ChunkMemory<Plan>& smem,
                          int begin, int end) {
  const Axis axis = axis_of<Plan>(problem, 0);
  const int group = Axis::kIsPart ? axis.key_group(walk.group) : walk.group;
  const int head = problem.group_size.quotient(walk.head);
  Ring<Plan::kStages> box;
  box.advance(begin);
#pragma unroll 1
  for (int i = begin; i < end; ++i, box.advance()) {
    const unsigned stage = box.slot();
    const int token = axis.token({group, walk.begin + i * Plan::kColumns});
    if (i >= Plan::kStages) smem.key_empty[stage].wait(box.parity() ^ 1);
    smem.key_full[stage].arrive_and_expect(sizeof(smem.key[0]));
    load_vectors(key, walk, head, token, problem.column_pieces, smem.key[stage],
                 smem.key_full[stage]);
    if (i >= Plan::kStages) smem.value_empty[stage].wait(box.parity() ^ 1);
    smem.value_full[stage].arrive_and_expect(sizeof(smem.value[0]));
    load_vectors(value, walk, head, token, problem.column_pieces, smem.value[stage],
                 smem.value_full[stage]);
  }
}

// A consumer: one thread of warpgroup `w`, which holds the queries `row` and `row + 8`.
template <typename Plan>
struct ChunkConsumer {
  static constexpr int kTiles = Plan::kValueColumns / 8;

  ChunkMemory<Plan>& smem;
  const HopperProblem<1>& problem;
  const Walk walk;
  const int w = threadIdx.x / 128;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  Range window[2];                  // of both, counted from the walk's first key on
  float output[1][kTiles][4] = {};  // O [64, kValueColumns]
  WarpSoftmax<1> softmax;

  __device__ ChunkConsumer(ChunkMemory<Plan>& smem, const HopperProblem<1>& problem,
                           const Walk& walk)
      : smem(smem), problem(problem), walk(walk) {
    const Axis axis = axis_of<Plan>(problem, 0);
#pragma unroll 1  // code comes from memory
    for (int half = 1; half >= 0; --half) {
      const int index = row + 8 * half;
      window[1] = window[0];
      window[0] = {0, 1 << 30};  // of one that does not exist: nothing needs to be hidden
      if (index >= walk.queries) continue;
      window[0] = axis.window(index, walk.group);
      window[0].begin -= walk.begin, window[0].end -= walk.begin;
    }
  }

  // Hides the logits S [64, kColumns] of pairs that are not visible, of the box from `first` on.
  __device__ void hide_invisible(float (&logit)[Plan::kColumns / 8][4], int first) const {
    const auto is_cut = [&](Range range) {
      return range.begin > first || range.end < first + Plan::kColumns;
    };
    if (!__any_sync(0xffffffffu, is_cut(window[0]) || is_cut(window[1]))) return;
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      hide(logit, half,
           first_columns(window[half].end - first, quad) &
               ~first_columns(window[half].begin - first, quad));
  }

  // Writes P = 2^(scale S - m) of a box as the left operand of a product, and adds its sums to
  // those of the rows. The tensor cores wait for it, so that it takes m as it is, and looks only
  // beside the exponentials whether m has to rise, which is seldom. Then m, O and the sums are made
  // so that P of this box can be written, and it returns false.
  template <int kTiles, int kSteps>
  __device__ bool weigh(const float (&logit)[1][kTiles][4], unsigned (&weight)[kSteps][4]) {
    using Element = typename Plan::Element;
    float largest[1][2] = {{-infinity<float>(), -infinity<float>()}};  // of this lane's columns
    float sum[2] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i % 2;
        float two[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = logit[0][2 * step + i / 2][2 * half + j];
          largest[0][half] = fmaxf(largest[0][half], x);
          two[j] = ex2_approx(fmaf(x, problem.scale, -softmax.row_max[0][half]));
          sum[half] += two[j];
        }
        weight[step][i] = pack(two[0], two[1], Element());
      }
    bool rises = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[0][half] *= problem.scale;
      rises |= largest[0][half] > softmax.row_max[0][half] + kRescaleThreshold;
    }
    if (__any_sync(0xffffffffu, rises)) {
      softmax.raise(largest, output);
      return false;
    }
    softmax.row_sum[0][0] += sum[0];
    softmax.row_sum[0][1] += sum[1];
    return true;
  }

  // Sums up O and the softmax over all boxes.
  __device__ void sum_up() {
    using Element = typename Plan::Element;
    smem.query_full.wait(0);
    if (walk.boxes == 0) return;
    const Descriptor queries = rows_descriptor(shared_address(smem.query[w]));
    const Descriptor keys_at = rows_descriptor(shared_address(smem.key));
    const Descriptor values_at =
        columns_descriptor(shared_address(smem.value), sizeof(smem.value[0][0]));
    float logit[1][Plan::kColumns / 8][4];
    unsigned weight[Plan::kColumns / 16][4];
    Ring<Plan::kStages> box;

    // S = Q K^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
    const auto multiply_keys = [&] {
      smem.key_full[box.slot()].wait(box.parity());
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(
          logit[0], queries, keys_at + box.slot() * (sizeof(smem.key[0]) / kDescriptorBytes));
    };

    // Warpgroups take turns at issuing products: left to themselves they stay as they begin, at the
    // same thing at the same time. One turn is there at first, and none is left in the end.
    const int turns = walk.boxes - 1;
    if (w == 1 && turns > 0) smem.turn[0].arrive_as_warp();
    multiply_keys();
    wait_for_products<0>();
    bool is_new = true;
    for (int i = 0;;) {
      hold(logit[0]);
      if (Plan::kSigned && is_new) multiply_by(logit[0], problem.sign);
      hide_invisible(logit[0], i * Plan::kColumns);
      is_new = weigh(logit, weight);
      if (!is_new) continue;
      smem.key_empty[box.slot()].arrive_as_warp();

      // O += P V, [64, kValueColumns] += [64, kColumns] [kColumns, kValueColumns]
      smem.value_full[box.slot()].wait(box.parity());
      if (i < turns) smem.turn[w].wait(i % 2);
      accumulate<Element, Plan::kValueColumns>(
          output[0], weight, values_at + box.slot() * (sizeof(smem.value[0]) / kDescriptorBytes));
      if (++i == walk.boxes) break;
      box.advance();
      multiply_keys();
      if (w == 0 || i < turns) smem.turn[1 - w].arrive_as_warp();
      wait_for_products<0>();
      hold(output[0]);
      smem.value_empty[box.before().slot()].arrive_as_warp();
    }
    wait_for_products<0>();
    hold(output[0]);
  }
};

template <typename Plan>
__global__ void CUNEIGH_CLUSTER(Plan::kCluster) __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    chunk(const HopperProblem<1> problem, const ChunkArguments<Plan> arguments,
          const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
          const __grid_constant__ TensorMap value) {
  using Smem = ChunkMemory<Plan>;
  static_assert(sizeof(Smem) == Plan::kSharedBytes,
                "'shared_bytes' in cuneigh/_backends/hopper/plan.py counts what it holds");
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<Smem*>(memory);
  constexpr int kKeyLoader = 128 * Plan::kWarpgroups, kQueryLoader = kKeyLoader + 32;  // threads
  if (threadIdx.x == 0) prefetch_map(query);
  if (threadIdx.x == 32) prefetch_map(key);
  if (threadIdx.x == 64) prefetch_map(value);
  const Walk walk = walk_of_block<Plan>(problem);
  // Loads begin before others know of the barriers
  if (threadIdx.x == kKeyLoader) {
    make_key_barriers(smem);
    load_keys(problem, key, value, walk, smem, 0, smaller(walk.boxes, 1));
  }
  if (threadIdx.x == kQueryLoader) load_queries(problem, query, walk, smem);
  __syncthreads();
  if (threadIdx.x >= kKeyLoader) {
    set_registers<false, kProducerRegisters<Plan>>();
    if (threadIdx.x == kKeyLoader) load_keys(problem, key, value, walk, smem, 1, walk.boxes);
    return;
  }

  set_registers<true, kConsumerRegisters<Plan>>();
  ChunkConsumer<Plan> me(smem, problem, walk);
  me.sum_up();

  const auto store = [&](int row, int first, const auto& output, int half,
                         const WarpSoftmax<1>& softmax, float sum) {
    const int head = me.walk.head + row / kRows, quad = threadIdx.x % 4;
    const int index = row % kRows;
    const int token[1] = {axis_of<Plan>(problem, 0).token({me.walk.group, index})};
    const bool exists = index < me.walk.queries;
    store_row(output, half, softmax.normalizer(sum), quad,
              arguments.output.at(me.walk.batch, token, head) + first, problem.value_dim - first,
              exists);
    if (arguments.lse.data && quad == 0 && first == 0 && exists)
      *arguments.lse.at(me.walk.batch, token, head) = softmax.lse(0, half, sum);
  };
  if constexpr (Plan::kCluster == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store(me.w * kRows + me.row + 8 * half, 0, me.output[0], half, me.softmax,
            me.softmax.sum(0, half));
  } else {
    if (threadIdx.x == 0) expect_shares(smem);
    cluster_arrive();  // its boxes have been multiplied
    cluster_wait();
    give_share(smem, me.output[0], me.softmax);
    smem.shares_full.wait(0);
    cluster_arrive();
    join_shares<Plan>(
        smem, [&](int row, int first, const auto& output, const WarpSoftmax<1>& joined, float sum) {
          store(row, first, output, 0, joined, sum);
        });
    cluster_wait();  // until others have what this block's memory holds for them
  }
}

}  // namespace cuneigh::hopper
