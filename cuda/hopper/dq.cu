// The gradient of queries on Hopper's tensor cores. Rows are queries, columns are keys. With
// P = 2^(scale S - lse) and dS = P * (dP - delta), a consumer does for each box of keys
//   S = Q K^T, dP = dO V^T, P and dS, dQ += dS K,
// and multiplies dQ by the scale in the end. The probabilities are computed while dP is. Roles,
// tiles and barriers are those of the forward pass (forward.cu).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct DqArguments : HiddenKeys<Plan> {
  View<const float2, Plan::kRank> statistics;  // of queries: {lse * log2(e), delta}
  View<typename Plan::Element, Plan::kRank> grad_query;
  unsigned* taken;  // 0 before the launch; see `begin_tiles`
};

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void differentiate(const HopperProblem<Plan::kRank>& problem,
                              const DqArguments<Plan>& arguments, SharedMemory<Plan>& smem, int w) {
  using Element = typename Plan::Element;
  using Smem = SharedMemory<Plan>;
  constexpr int kSteps = Plan::kColumns / 16;
  Consumer<Plan> me(smem, w);
  const Descriptor rows_at = rows_descriptor(shared_address(smem.row));
  const Descriptor keys_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor values_at = rows_descriptor(shared_address(smem.column_vo));
  const Descriptor key_columns_at =
      columns_descriptor(shared_address(smem.column_qk), sizeof(smem.column_qk[0][0]));

  while (me.begin_tile()) {
    const Descriptor queries = rows_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    const Descriptor grad_outputs =
        queries + Smem::kQkLines * (sizeof(smem.row[0][0]) / kDescriptorBytes);
    const Tile<Plan::kRank>& tile = me.tile();
    const int head = tile.head + problem.warpgroup[w][0];
    float lse[2], delta[2];  // of this thread's two queries; lse in base 2
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int token[Plan::kRank];
      float2 statistics = {infinity<float>(), 0};  // of a query that does not exist: no weights
      if (token_of_row<Plan>(problem, tile, w, me.row() + 8 * half, token))
        statistics = *arguments.statistics.at(tile.batch, token, head);
      lse[half] = statistics.x;
      delta[half] = statistics.y;
    }
    float grad_query[Plan::kHeadColumns / 8][4] = {};  // dQ [64, kHeadColumns]

    while (me.begin_box()) {
      const unsigned stage = me.boxes.slot();
      const unsigned qk = stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes);
      const unsigned vo = stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes);
      // S = Q K^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
      // dP = dO V^T, [64, kColumns] = [64, kValueDim] [kColumns, kValueDim]^T
      float logit[Plan::kColumns / 8][4], grad_weight[Plan::kColumns / 8][4];
      const int visibility = me.visibility();
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(logit, queries, keys_at + qk);
      unsigned seen[2];
      me.look(visibility, seen);
      me.wait_for_vo();
      multiply<Element, Plan::kValueDim, Plan::kColumns>(grad_weight, grad_outputs, values_at + vo);
      wait_for_products<1>();
      hold(logit);
      if (Plan::kSigned) multiply_by(logit, problem.sign);
      me.hide_invisible(logit, visibility, seen);
      // P = 2^(scale S - lse), in place of S
#pragma unroll
      for (auto& four : logit)
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = ex2_approx(fmaf(four[i], problem.scale, -lse[i / 2]));
      wait_for_products<0>();
      hold(grad_weight);
      me.release_vo();
      // dS = P * (dP - delta), in place of P
#pragma unroll
      for (int n = 0; n < Plan::kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) logit[n][i] *= grad_weight[n][i] - delta[i / 2];

      // dQ += dS K, [64, kHeadColumns] += [64, kColumns] [kColumns, kHeadColumns]
      unsigned grad_logit[kSteps][4];  // dS [64, kColumns]
      pack_weights<Element>(logit, 0, grad_logit);
      accumulate<Element, Plan::kHeadColumns>(grad_query, grad_logit, key_columns_at + qk);
      wait_for_products<0>();
      hold(grad_query);
      me.release_qk();
      me.end_box();
    }

    me.release_rows();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int token[Plan::kRank];
      const bool exists = token_of_row<Plan>(problem, tile, w, me.row() + 8 * half, token);
      store_row(grad_query, half, problem.gradient_scale, me.quad(),
                arguments.grad_query.at(tile.batch, token, head), problem.head_dim, exists);
    }
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    dq(const HopperProblem<Plan::kRank> problem, const DqArguments<Plan> arguments,
       const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap grad_output,
       const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
       const __grid_constant__ TensorMap additional_keys,
       const __grid_constant__ TensorMap additional_values) {
  auto& smem = begin_block<Plan>(problem);
  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    // Statistics are those of the rows, which the consumers read
    produce({query, grad_output, key, value, additional_keys, additional_values}, {}, arguments, {},
            arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    differentiate(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
