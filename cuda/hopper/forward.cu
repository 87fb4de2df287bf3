// The forward pass of attention on Hopper's tensor cores, after FlashAttention-3: output and lse of
// tiles of queries, nothing of the size of the logits in memory.
//
// A block has kWarpgroups warpgroups of consumers, each with a box of 64 queries, and one of
// producers (producers.cuh). Blocks stay and take tile after tile; barriers alone hold the roles
// together. A consumer does for each box of keys
//   S = Q K^T, S = -inf where a pair is not visible, P = 2^(scale S - m), O += P V,
// with the running row maximum m, and divides O by the sums of P in the end. It works serially;
// what one consumer leaves of the tensor cores' time the others use. P V is issued in halves, so
// that its first half runs under the exponentials of the second.
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct ForwardArguments : HiddenKeys<Plan> {
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
  unsigned* taken;               // 0 before the launch; see `begin_tiles`
};

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void attend(const HopperProblem<Plan::kRank>& problem,
                       const ForwardArguments<Plan>& arguments, SharedMemory<Plan>& smem, int w) {
  using Element = typename Plan::Element;
  constexpr int kHalf = Plan::kColumns / 2;
  Consumer<Plan> me(smem, w);
  const Descriptor queries_at = rows_descriptor(shared_address(smem.row));
  const Descriptor keys_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor values_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));

  while (me.begin_tile()) {
    const Descriptor queries =
        queries_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    float output[1][Plan::kValueColumns / 8][4] = {};  // O [64, kValueColumns]
    WarpSoftmax<1> softmax;

    while (me.begin_box()) {
      const unsigned stage = me.boxes.slot();
      // S = Q K^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
      float logit[1][Plan::kColumns / 8][4];
      const int visibility = me.visibility();
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(
          logit[0], queries, keys_at + stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes));
      unsigned seen[2];
      me.look(visibility, seen);
      wait_for_products<0>();
      hold(logit[0]);
      if (Plan::kSigned) multiply_by(logit[0], problem.sign);
      me.hide_invisible(logit[0], visibility, seen);
      me.release_qk();
      softmax.rescale(logit, problem.scale, output);

      // P = 2^(scale S - m), in halves, and for each
      // O += P V, [64, kValueColumns] += [64, kHalf] [kHalf, kValueColumns]
      const Descriptor values = values_at + stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = half * kHalf;
        unsigned weight[kHalf / 16][4];  // P [64, kHalf]
        softmax.exponentiate(logit, problem.scale, first / 8, (first + kHalf) / 8);
        pack_weights<Element>(logit[0], first, weight);
        if (half == 0) me.wait_for_vo();
        accumulate<Element, Plan::kValueColumns>(output[0], weight, values, first);
      }
      wait_for_products<0>();
      hold(output[0]);
      me.release_vo();
      me.end_box();
    }

    me.release_rows();
    const Tile<Plan::kRank>& tile = me.tile();
    const int head = tile.head + problem.warpgroup[w][0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int token[Plan::kRank];
      const bool exists = token_of_row<Plan>(problem, tile, w, me.row() + 8 * half, token);
      const float sum = softmax.sum(0, half);
      store_row(output[0], half, softmax.normalizer(sum), me.quad(),
                arguments.output.at(tile.batch, token, head), problem.value_dim, exists);
      if (arguments.lse.data && me.quad() == 0 && exists)
        *arguments.lse.at(tile.batch, token, head) = softmax.lse(0, half, sum);
    }
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    forward(const HopperProblem<Plan::kRank> problem, const ForwardArguments<Plan> arguments,
            const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
            const __grid_constant__ TensorMap value,
            const __grid_constant__ TensorMap additional_keys,
            const __grid_constant__ TensorMap additional_values) {
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
