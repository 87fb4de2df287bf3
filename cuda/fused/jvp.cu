// Neighborhood attention and its tangent in one pass on tensor cores. Where every operand moves
// along its tangent, for each query:
//
//   S = scale * Q K^T + rpb,   dS = scale * (dQ K^T + Q dK^T) + drpb
//   P = exp(S - max),          O = P V / sum(P),   lse = log(sum(exp(S)))
//   dlse = sum(P dS) / sum(P),   dO = (P dS V + P dV) / sum(P) - dlse O
//
// The walk is that of fused/forward.cu, with one batch-head for each block. With every box of keys
// and values come their tangents, which lie in memory like them.
//
// blockIdx.x: (batch-head, box of queries). The plan is that of fused/forward.cu, with kSharedBytes
// that of JvpSmem, and without kManyBatchHeads.

#include "cuneigh/warp_softmax.cuh"
#include "fused/bias.cuh"
#include "fused/moving_columns.cuh"
#include "fused/moving_products.cuh"
#include "fused/row_copies.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused {

// The operands of attention, or their tangents. The strides of both are the same, but for queries.
template <typename Plan>
struct Operands {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<const typename Plan::Element, Plan::kRank> additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
};

template <typename Plan>
struct JvpArguments : KeyMask<Plan> {
  Operands<Plan> operands, tangents;
  View<typename Plan::Element, Plan::kRank> output, tangent_output;  // may be null
  View<float, Plan::kRank> lse, tangent_lse;                         // may be null
};

template <typename Plan>
struct JvpSmem {
  using Element = typename Plan::Element;
  static constexpr int kRows = Tables<Plan>::kRows;
  static constexpr int kQkPitch = kVectorPitch<Element, Plan::kHeadDim>;
  static constexpr int kVoPitch = kVectorPitch<Element, Plan::kValueDim>;
  Element query[kRows][kQkPitch];                // [kRows, kHeadDim]
  Element d_query[kRows][kQkPitch];              // [kRows, kHeadDim]
  Element key[2][Plan::kColumns][kQkPitch];      // of two boxes: [kColumns, kHeadDim]
  Element d_key[2][Plan::kColumns][kQkPitch];    // of two boxes: [kColumns, kHeadDim]
  Element value[2][Plan::kColumns][kVoPitch];    // of two boxes: [kColumns, kValueDim]
  Element d_value[2][Plan::kColumns][kVoPitch];  // of two boxes: [kColumns, kValueDim]
  Tables<Plan> tables;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    jvp(const FusedProblem<Plan::kRank> problem, const JvpArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kRank = Plan::kRank;
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(JvpArguments<Plan>) == (16 + Plan::kKeyMask) * sizeof(View<float, kRank>),
                "`jvp` in cuneigh/_backends/fused/launch.py packs these views");
  static_assert(sizeof(JvpSmem<Plan>) == Plan::kSharedBytes,
                "`shared_bytes` in cuneigh/_backends/fused/plan.py counts what JvpSmem holds");
  auto& smem = dynamic_smem<JvpSmem<Plan>>();
  auto& tables = smem.tables;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;

  const int thread = thread_in_block(), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp * 16 * kRowTiles;
  const Columns<Plan> arrays = {
      operands.key, operands.value, operands.additional_keys, operands.additional_values, {}};
  const Columns<Plan> moved = {
      tangents.key, tangents.value, tangents.additional_keys, tangents.additional_values, {}};
  fill_tables<Plan>(problem, arrays, operands.rpb, arguments, tables, thread);
  __syncthreads();

  // Boxes of keys and values, and their tangents, arrive in two buffers by turns
  auto load = [&](const ColumnBox<Plan>& keys, int thread, int buffer) {
    load_moving_columns<Plan>(problem, arrays, moved, keys, tables, thread, smem.key[buffer],
                              smem.value[buffer], smem.d_key[buffer], smem.d_value[buffer]);
    cp_async_commit();
  };
  const BatchHead rows = {tables.share / problem.heads, tables.share % problem.heads};
  {
    const auto keys = first_box<Plan>(problem, arrays, arguments, tables, warp, rows);
    load_rows<Plan::kHeadDim, Plan::kKeyBytes>(operands.query, rows, problem.head_dim, tables, warp,
                                               lane, smem.query);
    load_rows<Plan::kHeadDim, Plan::kKeyBytes>(tangents.query, rows, problem.head_dim, tables, warp,
                                               lane, smem.d_query);
    load(keys, thread, 0);
    const auto next = next_box<Plan>(problem, arrays, arguments, tables, warp, keys);
    if (lane == 0) {
      tables.walk[warp][0] = keys;
      tables.walk[warp][1] = next;
    }
  }
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.query, warp, lane);
    multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.d_query, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8 keys or dimensions
  float output[kRowTiles][Plan::kValueDim / 8][4] = {};    // P V [kRowTiles * 16, kValueDim]
  float d_output[kRowTiles][Plan::kValueDim / 8][4] = {};  // P dS V + P dV
  float d_sum[kRowTiles][1][4] = {};                       // sum(P dS) of this lane's columns
  WarpSoftmax<kRowTiles> softmax;
  const float scale = problem.scale;

  const int given_thread = thread;
  int buffer = 0;
  for (;; buffer ^= 1) {
    const int thread = forgotten(given_thread), lane = thread % 32, warp = thread / 32;
    const int warp_row = warp * 16 * kRowTiles;
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    cp_async_wait<0>();
    __syncthreads();
    ColumnBox<Plan>& keys = tables.walk[warp][buffer];
    const ColumnBox<Plan>& next = tables.walk[warp][buffer ^ 1];
    if (keys.past_end) break;
    const Visibility visibility = keys.visibility;
    auto load_next = [&] {
      if (!next.past_end) load(next, thread, buffer ^ 1);
    };
    // The box after the next takes the place of this one
    auto walk = [&] {
      const auto after = next_box<Plan>(problem, arrays, arguments, tables, warp, next);
      __syncwarp();
      if (lane == 0) keys = after;
    };
    if (visibility == Visibility::kSome) fill_row_masks<Plan>(problem, keys, tables, warp, lane);
    if (visibility == Visibility::kNone) {
      load_next();
      walk();
      continue;
    }

    // S = Q K^T,  dS = dQ K^T + Q dK^T
    float weight[kRowTiles][kColumnTiles][4] = {};    // S and P [kRowTiles * 16, kColumns]
    float d_weight[kRowTiles][kColumnTiles][4] = {};  // dS and P dS
    moving_gemm_nt<Plan::kHeadDim>(&smem.query[warp_row], &smem.d_query[warp_row], smem.key[buffer],
                                   smem.d_key[buffer], lane, weight, d_weight);

    load_next();  // behind the reads of this box, which would wait for these writes

    // S = scale * S + rpb, dS likewise, and S = -inf outside of windows
    if (kHasBias || visibility == Visibility::kSome) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + m * 16 + half * 8 + lane / 4;
          auto visible = LaneMask<Plan::kColumns>::all();
          if (visibility == Visibility::kSome) visible = {tables.row_mask[row], lane};
          if constexpr (kHasBias) {
            add_bias<Plan>(operands.rpb, keys, tables, row, half, lane, scale, visible, weight[m]);
            add_bias<Plan>(tangents.rpb, keys, tables, row, half, lane, scale, visible,
                           d_weight[m]);
          }
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!visible(n * 8 + i)) weight[m][n][2 * half + i] = -infinity<float>();
        }
      }
    }

    // P = exp(S - row_max), with the scale where no bias brought it. P never exceeds 1, so that
    // P dS has room in float16
    const float factor = kHasBias ? 1.0f : scale;
    softmax.template rescale<false>(weight, factor, output, d_output, d_sum);
    walk();
    softmax.exponentiate(weight, factor);

    // P dS, which is 0 where P is 0, whatever dS is; from base 2 to the natural one
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = weight[m][n][i];
          d_weight[m][n][i] = p == 0 ? 0.0f : p * (factor * kLn2 * d_weight[m][n][i]);
          d_sum[m][0][i] += d_weight[m][n][i];
        }

    // O += P V,  dO += P dS V + P dV
    moving_gemm_nn<Plan::kValueDim>(weight, d_weight, smem.value[buffer], smem.d_value[buffer],
                                    lane, output, d_output);
  }

  // O and dO, divided by sum(P). A few rows of each warp at a time go out through the memory of
  // values that nobody needs any more
  const int last_lane = forgotten(given_thread) % 32;
  constexpr int kRowsAtOnce = Plan::kColumns < 8 * Plan::kWarps ? Plan::kColumns / Plan::kWarps : 8;
  auto* rows_smem = &smem.value[0][warp * kRowsAtOnce];  // [kRowsAtOnce, kValueDim]
  auto store = [&](const auto& view, int first_row, const float (&sum)[Plan::kValueDim / 8][4],
                   int half) {
    if (!view.data) return;
#pragma unroll
    for (int i = 0; i < 8; i += kRowsAtOnce) {
      if (last_lane / 4 / kRowsAtOnce * kRowsAtOnce == i) {
#pragma unroll
        for (int d = 0; d < Plan::kValueDim / 8; ++d)
          store_pair(element_of(rows_smem, last_lane / 4 % kRowsAtOnce, d * 8 + last_lane % 4 * 2),
                     sum[d][2 * half], sum[d][2 * half + 1]);
      }
      __syncwarp();
      store_rows<Plan::kValueDim, Plan::kValueBytes, kRowsAtOnce>(
          view, rows, problem.value_dim, tables, first_row + i, rows_smem, last_lane);
      __syncwarp();
    }
  };
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first_row = warp_row + m * 16 + half * 8, row = first_row + last_lane / 4;
      const float sum = softmax.sum(m, half);
      const float normalizer = softmax.normalizer(sum);
      const float d_lse =
          normalizer * sum_of_row(d_sum[m][0][2 * half] + d_sum[m][0][2 * half + 1]);
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          output[m][d][i] *= normalizer;
          d_output[m][d][i] = d_output[m][d][i] * normalizer - d_lse * output[m][d][i];
        }
      store(arguments.output, first_row, output[m], half);
      store(arguments.tangent_output, first_row, d_output[m], half);
      const auto& token = tables.token[row];
      if (last_lane % 4 > 0 || token[0] < 0) continue;
      if (arguments.lse.data)
        *arguments.lse.at(rows.batch, token, rows.head) = softmax.lse(m, half, sum);
      if (arguments.tangent_lse.data)
        *arguments.tangent_lse.at(rows.batch, token, rows.head) = d_lse;
    }
  }
}

}  // namespace cuneigh::fused
