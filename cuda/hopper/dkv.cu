// The gradients of keys and values on Hopper's tensor cores. Rows are keys, columns are queries.
// With P = 2^(scale S - lse) and dS = P * (dP - delta), a consumer does for each box of queries, of
// each query head that reads its keys,
//   S^T = K Q^T, dP^T = V dO^T, P^T and dS^T, dV += P^T dO, dK += dS^T Q,
// and multiplies dK by the scale in the end. The transposed weights stay in registers: they are
// left operands. The probabilities are computed while dP^T is, dS^T while dV is. If kAhead, dK of a
// box is left until S^T of the next is issued, so that the tensor cores have that to do while S^T
// is waited for. Until then the warpgroup holds the queries of the box. Roles, tiles and barriers
// are those of the forward pass (forward.cu).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/gradients.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void differentiate(const HopperProblem<Plan::kRank>& problem,
                              const DkvArguments<Plan>& arguments, SharedMemory<Plan>& smem,
                              int w) {
  using Element = typename Plan::Element;
  using Smem = SharedMemory<Plan>;
  constexpr int kTiles = Plan::kColumns / 8, kSteps = Plan::kColumns / 16;
  Consumer<Plan> me(smem, w);
  const Descriptor rows_at = rows_descriptor(shared_address(smem.row));
  const Descriptor queries_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor grad_outputs_at = rows_descriptor(shared_address(smem.column_vo));
  const Descriptor query_columns_at =
      columns_descriptor(shared_address(smem.column_qk), sizeof(smem.column_qk[0][0]));
  const Descriptor grad_output_columns_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));

  while (me.begin_tile()) {
    const Descriptor keys = rows_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    const Descriptor values = keys + Smem::kQkLines * (sizeof(smem.row[0][0]) / kDescriptorBytes);
    float grad_key[Plan::kHeadColumns / 8][4] = {};     // dK [64, kHeadColumns]
    float grad_value[Plan::kValueColumns / 8][4] = {};  // dV [64, kValueColumns]

    while (me.begin_box()) {
      constexpr unsigned kQkBox = sizeof(smem.column_qk[0]) / kDescriptorBytes;
      constexpr unsigned kVoBox = sizeof(smem.column_vo[0]) / kDescriptorBytes;
      unsigned grad_logit[kSteps][4] = {};  // dS^T of the last box [64, kColumns]
      Ring<Plan::kStages> last = me.boxes;  // its place; at first the next one's, for zeros
      // dK += dS^T Q, [64, kHeadColumns] += [64, kColumns] [kColumns, kHeadColumns]
      const auto accumulate_keys = [&] {
        accumulate<Element, Plan::kHeadColumns>(grad_key, grad_logit,
                                                query_columns_at + last.slot() * kQkBox);
      };
      do {
        const unsigned qk = me.boxes.slot() * kQkBox, vo = me.boxes.slot() * kVoBox;
        float logit[kTiles][4], grad_weight[kTiles][4];
        // dP^T = V dO^T, [64, kColumns] = [64, kValueDim] [kColumns, kValueDim]^T
        const auto multiply_values = [&] {
          me.wait_for_vo();
          multiply<Element, Plan::kValueDim, Plan::kColumns>(grad_weight, values,
                                                             grad_outputs_at + vo);
        };
        // S^T = K Q^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
        int visibility;
        unsigned seen[2];
        if constexpr (!Plan::kAhead) visibility = me.visibility();
        multiply<Element, Plan::kHeadDim, Plan::kColumns>(logit, keys, queries_at + qk);
        if constexpr (!Plan::kAhead) me.look(visibility, seen);
        if constexpr (Plan::kAhead)
          accumulate_keys();
        else
          multiply_values();
        wait_for_products<1>();
        hold(logit);
        if (Plan::kSigned) multiply_by(logit, problem.sign);
        if constexpr (Plan::kAhead)
          me.hide_invisible(logit, me.visibility());  // not before: registers are few
        else
          me.hide_invisible(logit, visibility, seen);
        if constexpr (Plan::kAhead) multiply_values();
        const auto& statistics = me.smem.statistics[me.boxes.slot()];
        const auto& lse = statistics.lse[me.quad()].of_columns;
        const auto& delta = statistics.delta[me.quad()].of_columns;
        exponentiate(logit, problem.scale, lse);  // P^T, in place of S^T
        // dV += P^T dO, [64, kValueColumns] += [64, kColumns] [kColumns, kValueColumns]
        unsigned weight[kSteps][4];  // P^T [64, kColumns]
        pack_weights<Element>(logit, 0, weight);
        accumulate<Element, Plan::kValueColumns>(grad_value, weight, grad_output_columns_at + vo);
        wait_for_products<1>();
        hold(grad_weight);
        if constexpr (Plan::kAhead) {
          hold(grad_key);
          if (last.slot() != me.boxes.slot()) me.release_qk(last);
        }
        multiply_by_weights<Element>(grad_weight, weight, delta, grad_logit);
        if constexpr (Plan::kAhead) {
          wait_for_products<0>();
          hold(grad_value);
          me.release_vo();
        }
        last = me.boxes;
        me.end_box();
      } while (Plan::kAhead && me.begin_box_beside(last));
      accumulate_keys();
      wait_for_products<0>();
      hold(grad_value);
      hold(grad_key);
      if (!Plan::kAhead) me.release_vo(last);
      me.release_qk(last);
    }

    me.release_rows();
    const int batch = me.tile().batch;
    for_each_key(
        problem, me, arguments, [&](int half, auto& token, int head, bool exists, bool is_hidden) {
          store_row(grad_key, half, problem.gradient_scale, me.quad(),
                    arguments.grad_key.at(batch, token, head), problem.head_dim, exists, is_hidden);
          store_row(grad_value, half, 1.0f, me.quad(), arguments.grad_value.at(batch, token, head),
                    problem.value_dim, exists, is_hidden);
        });
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    dkv(const HopperProblem<Plan::kRank> problem, const DkvArguments<Plan> arguments,
        const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
        const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap grad_output) {
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
    differentiate(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
