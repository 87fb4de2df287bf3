// The gradients of keys and values of long vectors on Hopper's tensor cores. Rows are keys, columns
// are queries. A warpgroup has no registers for dK and dV of its 64 rows if they have 256 elements
// each. So two consumers share a box of rows, and each makes one of them: for each box of queries,
// of each query head that reads the keys,
//   the first    S^T = K Q^T, P^T = 2^(scale S^T - lse), dV += P^T dO,
//   the second   dP^T = V dO^T, dS^T = P^T * (dP^T - delta), dK += dS^T Q,
// and dK is multiplied by the scale in the end. Weights stay in registers, as left operands; those
// of the first consumer go to the second through shared memory, lane by lane. There they have two
// slots, so that the first may be a box ahead: each works while the other waits for its products.
// Roles, tiles and barriers are those of the forward pass (forward.cu).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/gradients.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

// The first consumer, all of its 128 threads: P^T and dV.
template <typename Plan>
__device__ void differentiate_values(const HopperProblem<Plan::kRank>& problem,
                                     const DkvArguments<Plan>& arguments,
                                     SharedMemory<Plan>& smem) {
  using Element = typename Plan::Element;
  constexpr int kTiles = Plan::kColumns / 8, kSteps = Plan::kColumns / 16;
  Consumer<Plan> me(smem, 0);
  Ring<2> exchange;
  const Descriptor rows_at = rows_descriptor(shared_address(smem.row));
  const Descriptor queries_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor grad_output_columns_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));

  while (me.begin_tile()) {
    const Descriptor keys = rows_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    float grad_value[Plan::kValueColumns / 8][4] = {};  // dV [64, kValueColumns]

    while (me.begin_box()) {
      const unsigned stage = me.boxes.slot();
      // S^T = K Q^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
      float logit[kTiles][4], lse[2 * kTiles];
      const int visibility = me.visibility();
      read(smem.statistics[stage].lse[me.quad()].of_columns, lse);
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(
          logit, keys, queries_at + stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes));
      unsigned seen[2];
      me.look(visibility, seen);
      wait_for_products<0>();
      hold(logit);
      me.release_qk();
      if (Plan::kSigned) multiply_by(logit, problem.sign);
      me.hide_invisible(logit, visibility, seen);
      exponentiate(logit, problem.scale, lse);  // P^T, in place of S^T
      unsigned weight[kSteps][4];               // P^T [64, kColumns]
      pack_weights<Element>(logit, 0, weight);
      smem.exchange_empty[exchange.slot()].wait(exchange.parity() ^ 1);
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        smem.weight[exchange.slot()][step][me.thread] =
            make_uint4(weight[step][0], weight[step][1], weight[step][2], weight[step][3]);
      smem.exchange_full[exchange.slot()].arrive_as_warp();
      exchange.advance();
      // dV += P^T dO, [64, kValueColumns] += [64, kColumns] [kColumns, kValueColumns]
      me.wait_for_vo();
      accumulate<Element, Plan::kValueColumns>(
          grad_value, weight,
          grad_output_columns_at + stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes));
      wait_for_products<0>();
      hold(grad_value);
      me.release_vo();
      me.end_box();
    }

    me.release_rows();
    const int batch = me.tile().batch;
    for_each_key(
        problem, me, arguments, [&](int half, auto& token, int head, bool exists, bool is_hidden) {
          store_row(grad_value, half, 1.0f, me.quad(), arguments.grad_value.at(batch, token, head),
                    problem.value_dim, exists, is_hidden);
        });
    me.end_tile();
  }
}

// The second: dS^T and dK.
template <typename Plan>
__device__ void differentiate_keys(const HopperProblem<Plan::kRank>& problem,
                                   const DkvArguments<Plan>& arguments, SharedMemory<Plan>& smem) {
  using Element = typename Plan::Element;
  using Smem = SharedMemory<Plan>;
  constexpr int kTiles = Plan::kColumns / 8, kSteps = Plan::kColumns / 16;
  Consumer<Plan> me(smem, 0);
  Ring<2> exchange;
  const Descriptor values_at = rows_descriptor(shared_address(smem.row[0][Smem::kQkLines]));
  const Descriptor grad_outputs_at = rows_descriptor(shared_address(smem.column_vo));
  const Descriptor query_columns_at =
      columns_descriptor(shared_address(smem.column_qk), sizeof(smem.column_qk[0][0]));

  while (me.begin_tile()) {
    const Descriptor values = values_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    float grad_key[Plan::kHeadColumns / 8][4] = {};  // dK [64, kHeadColumns]

    while (me.begin_box()) {
      const unsigned stage = me.boxes.slot();
      // dP^T = V dO^T, [64, kColumns] = [64, kValueDim] [kColumns, kValueDim]^T
      float grad_weight[kTiles][4], delta[2 * kTiles];
      read(smem.statistics[stage].delta[me.quad()].of_columns, delta);
      me.wait_for_vo();
      multiply<Element, Plan::kValueDim, Plan::kColumns>(
          grad_weight, values,
          grad_outputs_at + stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes));
      smem.exchange_full[exchange.slot()].wait(exchange.parity());
      unsigned weight[kSteps][4];  // P^T [64, kColumns]
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4 four = smem.weight[exchange.slot()][step][me.thread];
        weight[step][0] = four.x, weight[step][1] = four.y;
        weight[step][2] = four.z, weight[step][3] = four.w;
      }
      smem.exchange_empty[exchange.slot()].arrive_as_warp();
      exchange.advance();
      wait_for_products<0>();
      hold(grad_weight);
      me.release_vo();
      unsigned grad_logit[kSteps][4];  // dS^T [64, kColumns]
      multiply_by_weights<Element>(grad_weight, weight, delta, grad_logit);
      // dK += dS^T Q, [64, kHeadColumns] += [64, kColumns] [kColumns, kHeadColumns]
      accumulate<Element, Plan::kHeadColumns>(
          grad_key, grad_logit,
          query_columns_at + stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes));
      wait_for_products<0>();
      hold(grad_key);
      me.release_qk();
      me.end_box();
    }

    me.release_rows();
    const int batch = me.tile().batch;
    for_each_key(
        problem, me, arguments, [&](int half, auto& token, int head, bool exists, bool is_hidden) {
          store_row(grad_key, half, problem.gradient_scale, me.quad(),
                    arguments.grad_key.at(batch, token, head), problem.head_dim, exists, is_hidden);
        });
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (kConsumers<Plan> + 1), 1)
    dkv_long(const HopperProblem<Plan::kRank> problem, const DkvArguments<Plan> arguments,
             const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
             const __grid_constant__ TensorMap query,
             const __grid_constant__ TensorMap grad_output) {
  static_assert(Plan::kPairs && Plan::kWarpgroups == 1, "one pair of consumers, and its box");
  auto& smem = begin_block<Plan>(problem);
  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    // No column is an additional key: the last two maps are never used
    produce({key, value, query, grad_output, query, grad_output}, arguments.queries, arguments, {},
            arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    if (warpgroup == 1)
      differentiate_values(problem, arguments, smem);
    else
      differentiate_keys(problem, arguments, smem);
  }
}

}  // namespace cuneigh::hopper
