// The forward pass of attention on Hopper's tensor cores for a chunk of queries, such as decoders
// have beside a cache of keys: output and lse. chunk.cuh says how it is cut.
//
// A block has two warpgroups of consumers and a warp that loads. The former have the same queries,
// so that they see the same boxes of keys, which fill all memory that queries leave: keys come from
// memory, not from the L2 cache. A consumer is ahead of itself: while it computes
// P = 2^(scale S - m) of a box, the tensor cores have O += P V of the one before to do, after
// FlashAttention-3.
//
// Where there are fewer tiles than multiprocessors, the blocks of a cluster share the boxes of one,
// and join their sums in the end (chunk_sums.cuh).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/chunk.cuh"
#include "hopper/chunk_sums.cuh"
#include "hopper/producers.cuh"
#include "hopper/products.cuh"
#include "hopper/results.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct ChunkArguments {
  View<typename Plan::Element, 1> output;
  View<float, 1> lse;  // may be null
};

// The warp that loads. It begins before the others know that there are barriers: they are told by
// a __syncthreads after the first boxes.
template <typename Plan>
__device__ void load_walk(const HopperProblem<1>& problem, const TensorMap& query,
                          const TensorMap& key, const TensorMap& value, ChunkMemory<Plan>& smem) {
  const Axis axis = axis_of<Plan>(problem, 0);
  const Walk walk = walk_of_block<Plan>(problem);
  const int group = Axis::kIsPart ? axis.key_group(walk.group) : walk.group;
  const auto load = [&](const TensorMap& map, int head, int token, const Pieces& pieces,
                        auto& lines, Barrier& full) {
    load_tokens<sizeof(lines) / sizeof(lines[0]), 1>(map, {{}, walk.batch, head, {token}}, pieces,
                                                     lines, full);
  };
  const bool is_first_lane = threadIdx.x % 32 == 0;
  if (is_first_lane) {
    smem.query_full.arrive_and_expect(sizeof(smem.query));
#pragma unroll 1
    for (int w = 0; w < Plan::kWarpgroups; ++w)
      load(query, walk.head + w, axis.token({walk.group, 0}), problem.row_pieces, smem.query[w],
           smem.query_full);
  }
  Ring<Plan::kStages> box;
#pragma unroll 1
  for (int i = 0; i < larger(walk.boxes, Plan::kStages); ++i, box.advance()) {
    const unsigned stage = box.slot();
    if (is_first_lane && i < walk.boxes) {
      const int head = problem.group_size.quotient(walk.head);
      const int token = axis.token({group, walk.begin + i * Plan::kColumns});
      if (i >= Plan::kStages) smem.key_empty[stage].wait(box.parity() ^ 1);
      smem.key_full[stage].arrive_and_expect(sizeof(smem.key[0]));
      load(key, head, token, problem.column_pieces, smem.key[stage], smem.key_full[stage]);
      if (i >= Plan::kStages) smem.value_empty[stage].wait(box.parity() ^ 1);
      smem.value_full[stage].arrive_and_expect(sizeof(smem.value[0]));
      load(value, head, token, problem.column_pieces, smem.value[stage], smem.value_full[stage]);
    }
    __syncwarp();
    if (i == Plan::kStages - 1) __syncthreads();
  }
}

// A consumer: one thread of warpgroup `w`, which holds the queries `row` and `row + 8`.
template <typename Plan>
struct ChunkConsumer {
  static constexpr int kTiles = Plan::kValueColumns / 8;

  ChunkMemory<Plan>& smem;
  const HopperProblem<1>& problem;
  const Walk walk = walk_of_block<Plan>(problem);
  const int w = threadIdx.x / 128;
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  Range window[2];                  // of both, counted from the walk's first key on
  float output[1][kTiles][4] = {};  // O [64, kValueColumns]
  WarpSoftmax<1> softmax;

  __device__ ChunkConsumer(ChunkMemory<Plan>& smem, const HopperProblem<1>& problem)
      : smem(smem), problem(problem) {
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
    // O += P V, [64, kValueColumns] += [64, kColumns] [kColumns, kValueColumns]
    const auto add_values = [&](Ring<Plan::kStages> box) {
      smem.value_full[box.slot()].wait(box.parity());
      accumulate<Element, Plan::kValueColumns>(
          output[0], weight, values_at + box.slot() * (sizeof(smem.value[0]) / kDescriptorBytes));
    };

    multiply_keys();
    wait_for_products<0>();
    for (int i = 0;; ++i) {
      // S of this box is there; O += P V of the one before may be under way
      hold(logit[0]);
      smem.key_empty[box.slot()].arrive_as_warp();
      if (Plan::kSigned) {
#pragma unroll
        for (auto& tile : logit[0])
#pragma unroll
          for (float& x : tile) x *= problem.sign;
      }
      hide_invisible(logit[0], i * Plan::kColumns);
      float factor[1][1][4] = {{{1, 1, 1, 1}}};  // of what was summed up so far
      softmax.rescale(logit, problem.scale, factor);
      softmax.exponentiate(logit, problem.scale);
      wait_for_products<0>();
      hold(output[0]);
      if (i > 0) smem.value_empty[box.before().slot()].arrive_as_warp();
      if (__any_sync(0xffffffffu, factor[0][0][0] != 1 || factor[0][0][2] != 1)) {
        multiply_row(output[0], 0, factor[0][0][0]);
        multiply_row(output[0], 1, factor[0][0][2]);
      }
      pack_weights<Element>(logit[0], 0, weight);
      if (i == walk.boxes - 1) break;
      const Ring<Plan::kStages> last = box;
      box.advance();
      multiply_keys();
      add_values(last);
      wait_for_products<1>();
    }
    add_values(box);
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
  constexpr int kConsumers = 128 * Plan::kWarpgroups;
  // Through a shuffle, the compiler knows that all threads of a warp do the same
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp >= kConsumers / 32) {
    set_registers<false, kProducerRegisters<Plan>>();
    if (warp > kConsumers / 32) {
      __syncthreads();
      return;
    }
    if (threadIdx.x == kConsumers) {
      smem.query_full.init(1);
      smem.sums_full.init(1);
#pragma unroll
      for (int i = 0; i < Plan::kStages; ++i) {
        smem.key_full[i].init(1);
        smem.value_full[i].init(1);
        smem.key_empty[i].init(0, kConsumers / 32);
        smem.value_empty[i].init(0, kConsumers / 32);
      }
      fence_barrier_init();
    }
    __syncwarp();
    load_walk(problem, query, key, value, smem);
    return;
  }

  set_registers<true, kConsumerRegisters<Plan>>();
  if (threadIdx.x == 0) prefetch_map(query);
  if (threadIdx.x == 32) prefetch_map(key);
  if (threadIdx.x == 64) prefetch_map(value);
  ChunkConsumer<Plan> me(smem, problem);
  __syncthreads();
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
    if (threadIdx.x == 0) expect_sums(smem);
    cluster_arrive();  // its boxes have been multiplied
    cluster_wait();
    give_sums(smem, me.output[0], me.softmax);
    smem.sums_full.wait(0);
    cluster_arrive();
    join_sums<Plan>(smem, [&](int row, int first, const auto& output, const WarpSoftmax<1>& joined,
                              float sum) { store(row, first, output, 0, joined, sum); });
    cluster_wait();  // until others have what this block's memory holds for them
  }
}

}  // namespace cuneigh::hopper
