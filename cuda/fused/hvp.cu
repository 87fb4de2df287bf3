// How the gradients of neighborhood attention change along tangents, which have a prime here, on
// tensor cores. With P = exp(scale * S + rpb - lse) and T = scale * S' + rpb', where S = Q K^T,
//
//   P' = P * (T - lse')   dS = P * (dP - delta)   dS' = P' * (dP - delta) + P * (dP' - delta')
//
//   rows are queries:  dP = dO V^T   dQ' = scale * (dS' K + dS K')
//   rows are keys:     dP = V dO^T   dK' = scale * (dS' Q + dS Q')   dV' = P' dO + P dO'
//
// In the words of problem.cuh, for both:
//
//   S = row_qk column_qk^T   S' = row_qk' column_qk^T + row_qk column_qk'^T   dP, dP' likewise of
//   vo grad_qk' = scale * (dS' column_qk + dS column_qk')                        dQ' or dK' grad_v'
//   = P' column_vo + P column_vo'                                     dV'
//
// The walk is that of fused/backward.cu. With every box of columns come their tangents, which lie
// in memory like them. In names `d_` stands for the prime.
//
// blockIdx.x: (batch, head, box of rows). The plan is that of fused/backward.cu, with kSharedBytes
// that of HvpSmem, and with
//
//   static constexpr bool kGradMoves;  whether there is a dO', which else is 0

#include "fused/bias.cuh"
#include "fused/moving_columns.cuh"
#include "fused/moving_products.cuh"
#include "fused/row_copies.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused {

template <typename Plan>
struct HvpArguments : KeyMask<Plan> {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  // The arrays, or their tangents: those of the columns lie in memory alike.
  struct Arrays {
    Vectors row_qk, row_vo;        // query and grad_output, or key and value
    Vectors column_qk, column_vo;  // key and value, or query and grad_output
    Vectors additional_keys, additional_values;
    View<const typename Plan::Bias, Plan::kRank> rpb;
    View<const float2, Plan::kRank> statistics;  // {lse * log2(e), delta}, or {lse', delta'}
  };
  Arrays arrays, tangents;
  View<typename Plan::Element, Plan::kRank> d_grad_qk, d_grad_v;  // of the rows
};

template <typename Plan>
struct HvpSmem {
  using Element = typename Plan::Element;
  static constexpr int kRows = Tables<Plan>::kRows;
  static constexpr int kQkPitch = kVectorPitch<Element, Plan::kHeadDim>;
  static constexpr int kVoPitch = kVectorPitch<Element, Plan::kValueDim>;
  // Of the queries, which are the columns of two boxes, or the rows
  using Statistics =
      float2[Plan::kRowsAreKeys ? 2 : 1][Plan::kRowsAreKeys ? Plan::kColumns : kRows];
  Element row_qk[kRows][kQkPitch];                   // [kRows, kHeadDim]; d_grad_qk in the end
  Element d_row_qk[kRows][kQkPitch];                 // [kRows, kHeadDim]
  Element row_vo[kRows][kVoPitch];                   // [kRows, kValueDim]; d_grad_v in the end
  Element d_row_vo[kRows][kVoPitch];                 // [kRows, kValueDim]
  Element column_qk[2][Plan::kColumns][kQkPitch];    // of two boxes: [kColumns, kHeadDim]
  Element d_column_qk[2][Plan::kColumns][kQkPitch];  // of two boxes: [kColumns, kHeadDim]
  Element column_vo[2][Plan::kColumns][kVoPitch];    // of two boxes: [kColumns, kValueDim]
  Element d_column_vo[2][Plan::kColumns][kVoPitch];  // of two boxes: [kColumns, kValueDim]
  Statistics statistics, d_statistics;
  Tables<Plan> tables;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    hvp(const FusedProblem<Plan::kRank> problem, const HvpArguments<Plan> arguments) {
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  constexpr bool kRowVoMoves = Plan::kRowsAreKeys || Plan::kGradMoves;
  constexpr bool kColumnVoMoves = !Plan::kRowsAreKeys || Plan::kGradMoves;
  static_assert(
      sizeof(HvpArguments<Plan>) == (18 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`hvp` in cuneigh/_backends/fused/launch.py packs these views");
  static_assert(sizeof(HvpSmem<Plan>) == Plan::kSharedBytes,
                "`shared_bytes` in cuneigh/_backends/fused/plan.py counts what HvpSmem holds");
  auto& smem = dynamic_smem<HvpSmem<Plan>>();
  auto& tables = smem.tables;
  const auto &arrays = arguments.arrays, &tangents = arguments.tangents;

  const int thread = thread_in_block(), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp * 16 * kRowTiles;
  using Arrays = typename HvpArguments<Plan>::Arrays;
  const auto columns_of = [](const Arrays& of) -> Columns<Plan> {
    return {of.column_qk, of.column_vo, of.additional_keys, of.additional_values, of.statistics};
  };
  const Columns<Plan> given = columns_of(arrays), moved = columns_of(tangents);
  fill_tables<Plan>(problem, given, arrays.rpb, arguments, tables, thread);
  __syncthreads();

  // Boxes of columns and their tangents arrive in two buffers by turns
  auto load = [&](const ColumnBox<Plan>& columns, int thread, int buffer) {
    const bool has_statistics = Plan::kRowsAreKeys && thread < Plan::kColumns;
    const float2* statistics = nullptr;
    if constexpr (Plan::kRowsAreKeys)
      if (has_statistics) statistics = columns.extra + tables.scalar_offset[thread].extra;
    const bool present = columns.present >> thread % 64 & 1;
    load_moving_columns<Plan, kColumnVoMoves>(problem, given, moved, columns, tables, thread,
                                              smem.column_qk[buffer], smem.column_vo[buffer],
                                              smem.d_column_qk[buffer], smem.d_column_vo[buffer]);
    if (has_statistics) {
      copy_8_bytes(&smem.statistics[buffer][thread], statistics, present);
      copy_8_bytes(&smem.d_statistics[buffer][thread],
                   like(statistics, arrays.statistics, tangents.statistics), present);
    }
    cp_async_commit();
  };
  const int heads = Plan::kRowsAreKeys ? problem.heads / problem.group_size : problem.heads;
  auto rows_of_block = [&] { return BatchHead{tables.share / heads, tables.share % heads}; };
  {
    const BatchHead rows = rows_of_block();
    const auto columns = first_box<Plan>(problem, given, arguments, tables, warp, rows);
    auto load_qk = [&](const auto& view, auto* rows_smem) {
      load_rows<Plan::kHeadDim, Plan::kKeyBytes>(view, rows, problem.head_dim, tables, warp, lane,
                                                 rows_smem);
    };
    auto load_vo = [&](const auto& view, auto* rows_smem) {
      load_rows<Plan::kValueDim, Plan::kValueBytes>(view, rows, problem.value_dim, tables, warp,
                                                    lane, rows_smem);
    };
    load_qk(arrays.row_qk, smem.row_qk);
    load_qk(tangents.row_qk, smem.d_row_qk);
    if constexpr (Plan::kGradQk) {
      load_vo(arrays.row_vo, smem.row_vo);
      if constexpr (kRowVoMoves) load_vo(tangents.row_vo, smem.d_row_vo);
    }
    load(columns, thread, 0);
    if constexpr (!Plan::kRowsAreKeys) {
      for (int row = thread; row < Tables<Plan>::kRows; row += Plan::kWarps * 32) {
        const auto& token = tables.token[row];
        copy_8_bytes(&smem.statistics[0][row], arrays.statistics.at(rows.batch, token, rows.head),
                     token[0] >= 0);
        copy_8_bytes(&smem.d_statistics[0][row],
                     tangents.statistics.at(rows.batch, token, rows.head), token[0] >= 0);
      }
      cp_async_commit();
    }
    const auto next = next_box<Plan>(problem, given, arguments, tables, warp, columns);
    if (lane == 0) {
      tables.walk[warp][0] = columns;
      tables.walk[warp][1] = next;
    }
  }
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.row_qk, warp, lane);
    multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.d_row_qk, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8
  float d_grad_qk[kRowTiles][Plan::kHeadDim / 8][4] = {};  // [kRowTiles * 16, kHeadDim]
  float d_grad_v[kRowTiles][Plan::kValueDim / 8][4] = {};  // [kRowTiles * 16, kValueDim]
  const float scale = problem.scale;

  const int given_thread = thread;
  for (int buffer = 0;; buffer ^= 1) {
    const int thread = forgotten(given_thread), lane = thread % 32, warp = thread / 32;
    const int warp_row = warp * 16 * kRowTiles;
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    cp_async_wait<0>();
    __syncthreads();
    ColumnBox<Plan>& columns = tables.walk[warp][buffer];
    const ColumnBox<Plan>& next = tables.walk[warp][buffer ^ 1];
    if (columns.past_end) break;
    const Visibility visibility = columns.visibility;
    auto load_next = [&] {
      if (!next.past_end) load(next, thread, buffer ^ 1);
    };
    // The box after the next takes the place of this one
    auto walk = [&] {
      const auto after = next_box<Plan>(problem, given, arguments, tables, warp, next);
      __syncwarp();
      if (lane == 0) columns = after;
    };
    if (visibility == Visibility::kSome) fill_row_masks<Plan>(problem, columns, tables, warp, lane);
    if (visibility == Visibility::kNone) {
      load_next();
      walk();
      continue;
    }
    // {lse, delta}, or {lse', delta'}, of the query that a logit is of
    auto of_query = [&](const auto& statistics, int m, int n, int i) {
      return Plan::kRowsAreKeys ? statistics[buffer][n * 8 + lane % 4 * 2 + i % 2]
                                : statistics[0][warp_row + m * 16 + i / 2 * 8 + lane / 4];
    };

    // S and S'
    float weight[kRowTiles][kColumnTiles][4] = {};    // S, P and dS [kRowTiles * 16, kColumns]
    float d_weight[kRowTiles][kColumnTiles][4] = {};  // S', P' and dS'
    moving_gemm_nt<Plan::kHeadDim>(&smem.row_qk[warp_row], &smem.d_row_qk[warp_row],
                                   smem.column_qk[buffer], smem.d_column_qk[buffer], lane, weight,
                                   d_weight);
    load_next();  // behind the reads of this box, which would wait for these writes

    // P = exp(scale * S + rpb - lse), and 0 outside of windows; P' = P * (scale * S' + rpb' -
    // lse'). Logits are in base 2, T is not
    const float factor = kHasBias ? 1.0f : scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        auto visible = LaneMask<Plan::kColumns>::all();
        if (visibility == Visibility::kSome) visible = {tables.row_mask[row], lane};
        if constexpr (kHasBias) {
          add_bias<Plan>(arrays.rpb, columns, tables, row, half, lane, scale, visible, weight[m]);
          add_bias<Plan>(tangents.rpb, columns, tables, row, half, lane, scale, visible,
                         d_weight[m]);
        }
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            const float lse = of_query(smem.statistics, m, n, i).x;
            const float p =
                visible(n * 8 + i % 2) ? ex2_approx(fmaf(weight[m][n][i], factor, -lse)) : 0.0f;
            const float d_lse = of_query(smem.d_statistics, m, n, i).x;
            weight[m][n][i] = p;
            d_weight[m][n][i] = p == 0 ? 0.0f : p * fmaf(d_weight[m][n][i], factor * kLn2, -d_lse);
          }
      }
    }
    if constexpr (!Plan::kGradQk) walk();

    // grad_v' += P' column_vo + P column_vo'
    if constexpr (Plan::kGradV) {
      gemm_nn<Plan::kValueDim>(d_weight, smem.column_vo[buffer], lane, d_grad_v);
      if constexpr (kColumnVoMoves)
        gemm_nn<Plan::kValueDim>(weight, smem.d_column_vo[buffer], lane, d_grad_v);
    }

    if constexpr (Plan::kGradQk) {
      // dP and dP'
      float grad_weight[kRowTiles][kColumnTiles][4] = {};    // [kRowTiles * 16, kColumns]
      float d_grad_weight[kRowTiles][kColumnTiles][4] = {};  // [kRowTiles * 16, kColumns]
      moving_gemm_nt<Plan::kValueDim, kRowVoMoves, kColumnVoMoves>(
          &smem.row_vo[warp_row], &smem.d_row_vo[warp_row], smem.column_vo[buffer],
          smem.d_column_vo[buffer], lane, grad_weight, d_grad_weight);

      // dS and dS'; where P is 0 they stay 0 whatever it is multiplied with
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float delta = of_query(smem.statistics, m, n, i).y;
            const float d_delta = of_query(smem.d_statistics, m, n, i).y;
            const float p = weight[m][n][i], d_p = d_weight[m][n][i];
            const float grad = grad_weight[m][n][i] - delta;
            const float d_grad = d_grad_weight[m][n][i] - d_delta;
            weight[m][n][i] = p == 0 ? 0.0f : p * grad;
            d_weight[m][n][i] = p == 0 ? 0.0f : fmaf(d_p, grad, p * d_grad);
          }
      walk();

      // grad_qk' += dS' column_qk + dS column_qk'
      gemm_nn<Plan::kHeadDim>(d_weight, smem.column_qk[buffer], lane, d_grad_qk);
      gemm_nn<Plan::kHeadDim>(weight, smem.d_column_qk[buffer], lane, d_grad_qk);
    }
  }

  // Every warp writes its results through the memory of its own rows
  const int last_lane =
      forgotten(thread) % 32;  // or what the first copies knew of it would be kept
  __syncwarp();
  if constexpr (Plan::kGradQk)
    round_rows<Plan::kHeadDim>(d_grad_qk, problem.gradient_scale, last_lane,
                               &smem.row_qk[warp_row]);
  if constexpr (Plan::kGradV)
    round_rows<Plan::kValueDim>(d_grad_v, 1.0f, last_lane, &smem.row_vo[warp_row]);
  __syncwarp();
  constexpr int kRows = kRowTiles * 16;
  const BatchHead rows = rows_of_block();
  if constexpr (Plan::kGradQk)
    store_rows<Plan::kHeadDim, Plan::kKeyBytes, kRows>(arguments.d_grad_qk, rows, problem.head_dim,
                                                       tables, warp_row, &smem.row_qk[warp_row],
                                                       last_lane);
  if constexpr (Plan::kGradV)
    store_rows<Plan::kValueDim, Plan::kValueBytes, kRows>(arguments.d_grad_v, rows,
                                                          problem.value_dim, tables, warp_row,
                                                          &smem.row_vo[warp_row], last_lane);
}

}  // namespace cuneigh::fused
