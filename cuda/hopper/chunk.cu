// The forward pass of attention on Hopper's tensor cores for a chunk of queries, at most 64, such
// as decoders have beside a cache of keys: output and lse.
//
// The warpgroups of a block have the same queries of heads that share a key head (Plan::kAlike), so
// that all of them see something of every box of keys, and none passes over one. Therefore a
// consumer can be ahead of itself: while P = 2^(scale S - m) of a box is computed, the tensor cores
// have O += P V of the box before to do, after FlashAttention-3. Two of these fill their time
// better than what three consumers of forward.cu would, which work serially, and for which there
// may be too few rows.
//
// Where there are fewer tiles than multiprocessors, the blocks of a cluster share the boxes of one,
// and join their sums in the end (cluster_sums.cuh). Such blocks take one tile each.
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/cluster_sums.cuh"
#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct ChunkArguments : HiddenKeys<Plan> {
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
  unsigned* taken;               // 0 before the launch; see `begin_tiles`
};

// O and the softmax of a consumer's rows over all boxes of the tile.
template <typename Plan, int kTiles>
__device__ void sum_up(const HopperProblem<Plan::kRank>& problem, Consumer<Plan>& me,
                       float (&output)[1][kTiles][4], WarpSoftmax<1>& softmax) {
  using Element = typename Plan::Element;
  if (me.left <= 0) return;
  SharedMemory<Plan>& smem = me.smem;
  const Descriptor queries = rows_descriptor(shared_address(smem.row)) +
                             me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
  const Descriptor keys_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor values_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));
  float logit[1][Plan::kColumns / 8][4];
  unsigned weight[Plan::kColumns / 16][4];

  // S = Q K^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
  const auto multiply_keys = [&] {
    const unsigned stage = me.boxes.slot();
    smem.qk_full[stage].wait(me.boxes.parity());
    multiply<Element, Plan::kHeadDim, Plan::kColumns>(
        logit[0], queries, keys_at + stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes));
  };
  // O += P V, [64, kValueColumns] += [64, kColumns] [kColumns, kValueColumns]
  const auto add_values = [&](Ring<Plan::kStages> box) {
    smem.vo_full[box.slot()].wait(box.parity());
    accumulate<Element, Plan::kValueColumns>(
        output[0], weight, values_at + box.slot() * (sizeof(smem.column_vo[0]) / kDescriptorBytes));
  };

  multiply_keys();
  wait_for_products<0>();
  for (bool is_first = true;; is_first = false) {
    // S of this box is there; O += P V of the one before may be under way
    hold(logit[0]);
    if (Plan::kSigned) multiply_by(logit[0], problem.sign);
    me.hide_invisible(logit[0]);
    me.release_qk();
    float factor[1][1][4] = {{{1, 1, 1, 1}}};  // of what was summed up so far
    softmax.rescale(logit, problem.scale, factor);
    softmax.exponentiate(logit, problem.scale);
    wait_for_products<0>();
    hold(output[0]);
    if (!is_first) smem.vo_empty[me.boxes.before().slot()].arrive_as_warp();
    if (__any_sync(0xffffffffu, factor[0][0][0] != 1 || factor[0][0][2] != 1)) {
      multiply_row(output[0], 0, factor[0][0][0]);
      multiply_row(output[0], 1, factor[0][0][2]);
    }
    pack_weights<Element>(logit[0], 0, weight);
    if (me.left == 1) break;
    const Ring<Plan::kStages> box = me.boxes;
    me.end_box();
    multiply_keys();
    add_values(box);
    wait_for_products<1>();
  }
  add_values(me.boxes);
  wait_for_products<0>();
  hold(output[0]);
  me.release_vo();
  me.end_box();
}

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void attend(const HopperProblem<Plan::kRank>& problem,
                       const ChunkArguments<Plan>& arguments, SharedMemory<Plan>& smem, int w) {
  Consumer<Plan> me(smem, w);
  const auto store = [&](int w, int row, int first, const auto& output, int half,
                         const WarpSoftmax<1>& softmax, float sum) {
    const Tile<Plan::kRank>& tile = me.tile();
    const int head = tile.head + problem.warpgroup[w][0];
    int token[Plan::kRank];
    const bool exists = token_of_row<Plan>(problem, tile, w, row, token);
    store_row(output, half, softmax.normalizer(sum), me.quad,
              arguments.output.at(tile.batch, token, head) + first, problem.value_dim - first,
              exists);
    if (arguments.lse.data && me.quad == 0 && first == 0 && exists)
      *arguments.lse.at(tile.batch, token, head) = softmax.lse(0, half, sum);
  };

  while (me.begin_tile()) {
    float output[1][Plan::kValueColumns / 8][4] = {};  // O [64, kValueColumns]
    WarpSoftmax<1> softmax;
    sum_up(problem, me, output, softmax);
    me.release_rows();
    if constexpr (Plan::kCluster > 1) {
      cluster_arrive();  // its columns have been multiplied
      cluster_wait();
      give_sums(me, output[0], softmax);
      cluster_sync();
      join_sums<Plan>(
          smem, [&](int w, int row, int first, const auto& output, const WarpSoftmax<1>& joined,
                    float sum) { store(w, row, first, output, 0, joined, sum); });
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store(w, me.row + 8 * half, 0, output[0], half, softmax, softmax.sum(0, half));
    }
    me.end_tile();
  }
}

template <typename Plan>
__global__ void CUNEIGH_CLUSTER(Plan::kCluster) __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    chunk(const HopperProblem<Plan::kRank> problem, const ChunkArguments<Plan> arguments,
          const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
          const __grid_constant__ TensorMap value,
          const __grid_constant__ TensorMap additional_keys,
          const __grid_constant__ TensorMap additional_values) {
  static_assert(Plan::kAlike && !Plan::kKeyMask, "no box is passed over");
  if (threadIdx.x == 0) {
    prefetch_map(query);
    prefetch_map(key);
    prefetch_map(value);
  }
  auto& smem = begin_block<Plan>(problem);
  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    // Rows have no vo, hence the query twice, and there are no statistics
    produce({query, query, key, value, additional_keys, additional_values}, {}, arguments, {},
            arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    attend(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
