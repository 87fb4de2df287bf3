// Attention and its tangent in one pass on Hopper's tensor cores. Rows are queries, columns are
// keys; every array comes with its tangent. A consumer does for each box of keys
//   S = Q K^T,  dS = scale (dQ K^T + Q dK^T),  P = 2^(scale S - m),
//   O += P V,  dO += P dV + (P dS) V,
// with the running row maximum m, and in the end
//   O = O / sum(P),  dlse = sum(P dS) / sum(P),  dO = dO / sum(P) - dlse O.
// The weights stay in registers: they are left operands. P is computed while dS is, P dS while P V
// and P dV are. Roles, tiles and barriers are those of the forward pass (forward.cu).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/consumers.cuh"
#include "hopper/producers.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct JvpArguments : HiddenKeys<Plan> {
  View<typename Plan::Element, Plan::kRank> output, tangent_output;  // may be null
  View<float, Plan::kRank> lse, tangent_lse;                         // may be null
  unsigned* taken;  // 0 before the launch; see `begin_tiles`
};

// P dS, in place of dS [64, 8 kTiles] without its scale, of the columns [8 begin, 8 end); and its
// sums over those of a thread's rows, where `sum` has the first of either. It is 0 where P is 0,
// whatever dS is.
template <int kTiles>
__device__ void multiply_by_weights(float (&d_logit)[kTiles][4], const float (&weight)[kTiles][4],
                                    float scale, int begin, int end, float (&sum)[1][1][4]) {
#pragma unroll
  for (int n = begin; n < end; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float p = weight[n][i];
      d_logit[n][i] = p == 0 ? 0.0f : p * (scale * d_logit[n][i]);
      sum[0][0][2 * (i / 2)] += d_logit[n][i];
    }
}

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void attend(const HopperProblem<Plan::kRank>& problem,
                       const JvpArguments<Plan>& arguments, SharedMemory<Plan>& smem, int w) {
  using Element = typename Plan::Element;
  using Smem = SharedMemory<Plan>;
  constexpr int kPart = 32;  // columns whose weights become operands at a time: registers are few
  // P dS has room in bfloat16, if P exceeds 1 now and then
  constexpr bool kMayLag = kSame<Element, bfloat16>;
  // From an array to its tangent
  constexpr int kRowTangent = Smem::kQkLines * sizeof(smem.row[0][0]) / kDescriptorBytes;
  constexpr int kKeyTangent = Smem::kQkLines * sizeof(smem.column_qk[0][0]) / kDescriptorBytes;
  constexpr int kValueTangent = Smem::kVoLines * sizeof(smem.column_vo[0][0]) / kDescriptorBytes;
  Consumer<Plan> me(smem, w);
  const Descriptor queries_at = rows_descriptor(shared_address(smem.row));
  const Descriptor keys_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor values_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));

  while (me.begin_tile()) {
    const Descriptor queries =
        queries_at + me.rows.slot() * (sizeof(smem.row[0]) / kDescriptorBytes);
    float output[1][Plan::kValueColumns / 8][4] = {};    // O [64, kValueColumns]
    float d_output[1][Plan::kValueColumns / 8][4] = {};  // dO [64, kValueColumns]
    float d_sum[1][1][4] = {};  // sum(P dS) of this thread's columns: of its rows, in 0 and in 2
    WarpSoftmax<1> softmax;

    while (me.begin_box()) {
      const unsigned stage = me.boxes.slot();
      const Descriptor keys = keys_at + stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes);
      const Descriptor values = values_at + stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes);
      // S = Q K^T and dS = dQ K^T + Q dK^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
      float logit[1][Plan::kColumns / 8][4], d_logit[Plan::kColumns / 8][4];
      const int visibility = me.visibility();
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(logit[0], queries, keys);
      unsigned seen[2];
      me.look(visibility, seen);
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(d_logit, queries + kRowTangent, keys);
      multiply<Element, Plan::kHeadDim, Plan::kColumns, true>(d_logit, queries, keys + kKeyTangent);
      wait_for_products<2>();
      hold(logit[0]);
      if (Plan::kSigned) multiply_by(logit[0], problem.sign);
      me.hide_invisible(logit[0], visibility, seen);
      softmax.template rescale<kMayLag>(logit, problem.scale, output, d_output, d_sum);
      softmax.exponentiate(logit, problem.scale);

      // O += P V and dO += P dV + (P dS) V,
      // [64, kValueColumns] += [64, kPart] [kPart, kValueColumns]
      me.wait_for_vo();
#pragma unroll
      for (int first = 0; first < Plan::kColumns; first += kPart) {
        unsigned weight[kPart / 16][4], d_weight[kPart / 16][4];  // P and P dS [64, kPart]
        pack_weights<Element>(logit[0], first, weight);
        accumulate<Element, Plan::kValueColumns>(output[0], weight, values, first);
        accumulate<Element, Plan::kValueColumns>(d_output[0], weight, values + kValueTangent,
                                                 first);
        if (first == 0) {
          wait_for_products<2>();
          hold(d_logit);
          me.release_qk();
        }
        multiply_by_weights(d_logit, logit[0], problem.gradient_scale, first / 8,
                            (first + kPart) / 8, d_sum);
        pack_weights<Element>(d_logit, first, d_weight);
        accumulate<Element, Plan::kValueColumns>(d_output[0], d_weight, values, first);
      }
      wait_for_products<0>();
      hold(output[0]);
      hold(d_output[0]);
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
      const float sum = softmax.sum(0, half), normalizer = softmax.normalizer(sum);
      const float d_lse =
          normalizer * sum_of_row(d_sum[0][0][2 * half] + d_sum[0][0][2 * half + 1]);
#pragma unroll
      for (int d = 0; d < Plan::kValueColumns / 8; ++d)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) d_output[0][d][i] -= d_lse * output[0][d][i];
      auto store = [&](const auto& view, const auto& sums) {
        store_row(sums, half, normalizer, me.quad(), view.at(tile.batch, token, head),
                  problem.value_dim, exists && view.data);
      };
      store(arguments.output, output[0]);
      store(arguments.tangent_output, d_output[0]);
      if (me.quad() > 0 || !exists) continue;
      if (arguments.lse.data)
        *arguments.lse.at(tile.batch, token, head) = softmax.lse(0, half, sum);
      if (arguments.tangent_lse.data) *arguments.tangent_lse.at(tile.batch, token, head) = d_lse;
    }
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    jvp(const HopperProblem<Plan::kRank> problem, const JvpArguments<Plan> arguments,
        const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
        const __grid_constant__ TensorMap value, const __grid_constant__ TensorMap additional_keys,
        const __grid_constant__ TensorMap additional_values,
        const __grid_constant__ TensorMap d_query, const __grid_constant__ TensorMap d_key,
        const __grid_constant__ TensorMap d_value,
        const __grid_constant__ TensorMap d_additional_keys,
        const __grid_constant__ TensorMap d_additional_values) {
  auto& smem = begin_block<Plan>(problem);
  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    // Rows have no vo, hence the query twice, and there are no statistics
    const Maps tangents = {d_query, d_query,           d_key,
                           d_value, d_additional_keys, d_additional_values};
    produce({query, query, key, value, additional_keys, additional_values, &tangents}, {},
            arguments, {}, arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    attend(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
