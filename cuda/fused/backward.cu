// The gradients of neighborhood attention in one pass each on tensor cores, the logits recomputed.
// With P = exp(scale * S + rpb - lse) and dS = P * (dP - delta):
//
//   rows are queries:  S = Q K^T   dP = dO V^T   dQ = scale * dS K
//   rows are keys:     S = K Q^T   dP = V dO^T   dK = scale * dS Q   dV = P dO
//
// In the words of problem.cuh, for both:
//
//   S = row_qk column_qk^T   dP = row_vo column_vo^T
//   grad_qk = scale * dS column_qk                      dQ or dK
//   grad_v = P column_vo                                dV
//
// A block takes a box of rows and walks over the boxes of columns that cover their window union;
// for keys in every query head that shares them. There are no atomics, so that the order of all
// sums is fixed.
//
// blockIdx.x: (batch, head, box of rows). The plan is that of fused/forward.cu, with kSharedBytes
// that of BackwardSmem, without kManyBatchHeads, and with
//
//   static constexpr bool kGradQk, kGradV;  which gradients to compute. Long dK and dV are too many
//                                           registers for one kernel

#include "fused/bias.cuh"
#include "fused/products.cuh"
#include "fused/row_copies.cuh"
#include "fused/thread.cuh"
#include "fused/walk.cuh"

namespace cuneigh::fused {

template <typename Plan>
struct BackwardArguments : KeyMask<Plan> {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  Vectors row_qk, row_vo;        // query and grad_output, or key and value
  Vectors column_qk, column_vo;  // key and value, or query and grad_output
  Vectors additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
  View<const float2, Plan::kRank> statistics;                 // of queries: {lse * log2(e), delta}
  View<typename Plan::Element, Plan::kRank> grad_qk, grad_v;  // of the rows; queries have no grad_v
};

template <typename Plan>
struct BackwardSmem {
  using Element = typename Plan::Element;
  static constexpr int kRows = Tables<Plan>::kRows;
  static constexpr int kQkPitch = kVectorPitch<Element, Plan::kHeadDim>;
  static constexpr int kVoPitch = kVectorPitch<Element, Plan::kValueDim>;
  Element row_qk[kRows][kQkPitch];                 // [kRows, kHeadDim]; grad_qk in the end
  Element row_vo[kRows][kVoPitch];                 // [kRows, kValueDim]; grad_v in the end
  Element column_qk[2][Plan::kColumns][kQkPitch];  // of two boxes: [kColumns, kHeadDim]
  Element column_vo[2][Plan::kColumns][kVoPitch];  // of two boxes: [kColumns, kValueDim]
  // Of the queries, which are the columns of two boxes, or the rows
  float2 statistics[Plan::kRowsAreKeys ? 2 : 1][Plan::kRowsAreKeys ? Plan::kColumns : kRows];
  Tables<Plan> tables;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    backward(const FusedProblem<Plan::kRank> problem, const BackwardArguments<Plan> arguments) {
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(
      sizeof(BackwardArguments<Plan>) == (10 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`backward` in cuneigh/_backends/fused/launch.py packs these views");
  static_assert(sizeof(BackwardSmem<Plan>) == Plan::kSharedBytes,
                "`shared_bytes` in cuneigh/_backends/fused/plan.py counts what BackwardSmem holds");
  auto& smem = dynamic_smem<BackwardSmem<Plan>>();
  auto& tables = smem.tables;

  const int thread = thread_in_block(), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp * 16 * kRowTiles;
  const Columns<Plan> arrays = {arguments.column_qk, arguments.column_vo, arguments.additional_keys,
                                arguments.additional_values, arguments.statistics};
  fill_tables<Plan>(problem, arrays, arguments.rpb, arguments, tables, thread);
  __syncthreads();

  // Boxes of columns arrive in two buffers by turns
  auto load = [&](const ColumnBox<Plan>& columns, int thread, int buffer) {
    const bool has_statistics = Plan::kRowsAreKeys && thread < Plan::kColumns;
    const float2* statistics = nullptr;
    if constexpr (Plan::kRowsAreKeys)
      if (has_statistics) statistics = columns.extra + tables.scalar_offset[thread].extra;
    const bool present = columns.present >> thread % 64 & 1;
    load_columns<Plan>(problem, columns, tables, thread, smem.column_qk[buffer],
                       smem.column_vo[buffer]);
    if (has_statistics) copy_8_bytes(&smem.statistics[buffer][thread], statistics, present);
    cp_async_commit();
  };
  const int heads = Plan::kRowsAreKeys ? problem.heads / problem.group_size : problem.heads;
  auto rows_of_block = [&] { return BatchHead{tables.share / heads, tables.share % heads}; };
  {
    const BatchHead rows = rows_of_block();
    const auto columns = first_box<Plan>(problem, arrays, arguments, tables, warp, rows);
    load_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.row_qk, rows, problem.head_dim, tables,
                                               warp, lane, smem.row_qk);
    if constexpr (Plan::kGradQk)
      load_rows<Plan::kValueDim, Plan::kValueBytes>(arguments.row_vo, rows, problem.value_dim,
                                                    tables, warp, lane, smem.row_vo);
    load(columns, thread, 0);
    if constexpr (!Plan::kRowsAreKeys) {
      for (int row = thread; row < Tables<Plan>::kRows; row += Plan::kWarps * 32)
        copy_8_bytes(&smem.statistics[0][row],
                     arguments.statistics.at(rows.batch, tables.token[row], rows.head),
                     tables.token[row][0] >= 0);
      cp_async_commit();
    }
    const auto next = next_box<Plan>(problem, arrays, arguments, tables, warp, columns);
    if (lane == 0) {
      tables.walk[warp][0] = columns;
      tables.walk[warp][1] = next;
    }
  }
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.row_qk, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8
  float grad_qk[kRowTiles][Plan::kHeadDim / 8][4] = {};  // [kRowTiles * 16, kHeadDim]
  float grad_v[kRowTiles][Plan::kValueDim / 8][4] = {};  // [kRowTiles * 16, kValueDim]
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
      const auto after = next_box<Plan>(problem, arrays, arguments, tables, warp, next);
      __syncwarp();
      if (lane == 0) columns = after;
    };
    if (visibility == Visibility::kSome) fill_row_masks<Plan>(problem, columns, tables, warp, lane);
    if (visibility == Visibility::kNone) {
      load_next();
      walk();
      continue;
    }

    // S = row_qk column_qk^T
    float weight[kRowTiles][kColumnTiles][4] = {};  // S, P and dS [kRowTiles * 16, kColumns]
    gemm_nt<Plan::kHeadDim>(&smem.row_qk[warp_row], smem.column_qk[buffer], lane, weight);
    load_next();  // behind the reads of this box, which would wait for these writes

    // P = exp(scale * S + rpb - lse), and 0 outside of windows
    const float factor = kHasBias ? 1.0f : scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        auto visible = LaneMask<Plan::kColumns>::all();
        if (visibility == Visibility::kSome) visible = {tables.row_mask[row], lane};
        if constexpr (kHasBias)
          add_bias<Plan>(arguments.rpb, columns, tables, row, half, lane, scale, visible,
                         weight[m]);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = weight[m][n][2 * half + i];
            const float lse = Plan::kRowsAreKeys
                                  ? smem.statistics[buffer][n * 8 + lane % 4 * 2 + i].x
                                  : smem.statistics[0][row].x;
            x = visible(n * 8 + i) ? ex2_approx(fmaf(x, factor, -lse)) : 0.0f;
          }
      }
    }
    if constexpr (!Plan::kGradQk) walk();

    // grad_v += P column_vo
    if constexpr (Plan::kGradV)
      gemm_nn<Plan::kValueDim>(weight, smem.column_vo[buffer], lane, grad_v);

    if constexpr (Plan::kGradQk) {
      // dP = row_vo column_vo^T
      float grad_weight[kRowTiles][kColumnTiles][4] = {};  // dP [kRowTiles * 16, kColumns]
      gemm_nt<Plan::kValueDim>(&smem.row_vo[warp_row], smem.column_vo[buffer], lane, grad_weight);

      // dS = P * (dP - delta); where P is 0 it stays 0 whatever it is multiplied with
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float delta =
                Plan::kRowsAreKeys ? smem.statistics[buffer][n * 8 + lane % 4 * 2 + i % 2].y
                                   : smem.statistics[0][warp_row + m * 16 + i / 2 * 8 + lane / 4].y;
            const float p = weight[m][n][i];
            weight[m][n][i] = p == 0 ? 0.0f : p * (grad_weight[m][n][i] - delta);
          }
      walk();

      // grad_qk += dS column_qk
      gemm_nn<Plan::kHeadDim>(weight, smem.column_qk[buffer], lane, grad_qk);
    }
  }

  // Every warp writes its gradients through the memory of its own rows
  const int last_lane =
      forgotten(thread) % 32;  // or what the first copies knew of it would be kept
  __syncwarp();
  if constexpr (Plan::kGradQk)
    round_rows<Plan::kHeadDim>(grad_qk, problem.gradient_scale, last_lane, &smem.row_qk[warp_row]);
  if constexpr (Plan::kGradV)
    round_rows<Plan::kValueDim>(grad_v, 1.0f, last_lane, &smem.row_vo[warp_row]);
  __syncwarp();
  constexpr int kRows = kRowTiles * 16;
  const BatchHead rows = rows_of_block();
  if constexpr (Plan::kGradQk)
    store_rows<Plan::kHeadDim, Plan::kKeyBytes, kRows>(arguments.grad_qk, rows, problem.head_dim,
                                                       tables, warp_row, &smem.row_qk[warp_row],
                                                       last_lane);
  if constexpr (Plan::kGradV)
    store_rows<Plan::kValueDim, Plan::kValueBytes, kRows>(arguments.grad_v, rows, problem.value_dim,
                                                          tables, warp_row, &smem.row_vo[warp_row],
                                                          last_lane);
}

}  // namespace cuneigh::fused
