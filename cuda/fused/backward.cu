// The gradients of neighborhood attention in one pass each on tensor cores, the logits recomputed:
//
//   rows are queries:  S = Q K^T, dP = dO V^T, dQ = scale * dS K
//   rows are keys:     S = K Q^T, dP = V dO^T, dK = scale * dS Q, dV = P dO
//
// with P = exp(scale * S + rpb - lse) and dS = P * (dP - delta). A block takes a box of rows and
// walks over the boxes of columns that they meet: the window of queries, the inverse window of
// keys, in every query head that shares them. No atomics, so that the sums never change.
//
// blockIdx.x: (batch, head, box of rows). The plan is that of fused/forward.cu, with kSharedBytes
// that of BackwardSmem and
//
//   static constexpr bool kGradKey, kGradValue;  which gradients to compute: dQ or dK, and dV. Long
//                                                dK and dV are too many registers for one kernel

#include "cuneigh/boxes.cuh"
#include "fused/async.cuh"
#include "fused/copies.cuh"
#include "fused/fused.cuh"
#include "fused/products.cuh"
#include "fused/visible.cuh"

namespace cuneigh::fused {

template <typename Plan>
struct FusedBackward {
  using Const = View<const typename Plan::Element, Plan::kRank>;
  Const row_key, row_value;        // query and grad_output, or key and value
  Const column_key, column_value;  // key and value, or query and grad_output
  Const additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
  View<const float2, Plan::kRank> statistics;                      // by fused_delta
  View<typename Plan::Element, Plan::kRank> grad_key, grad_value;  // of the rows; queries have one
};

template <typename Plan>
struct BackwardSmem {
  using Element = typename Plan::Element;
  Element row_key[Tables<Plan>::kRows]
                 [kVectorPitch<Element, Plan::kHeadDim>];  // in the end the gradients
  Element row_value[Tables<Plan>::kRows][kVectorPitch<Element, Plan::kValueDim>];
  Element key[2][Plan::kColumns][kVectorPitch<Element, Plan::kHeadDim>];
  Element value[2][Plan::kColumns][kVectorPitch<Element, Plan::kValueDim>];
  // Of the boxes of columns where those are queries, else of the rows
  float2 statistics[Plan::kRowsAreKeys ? 2 : 1]
                   [Plan::kRowsAreKeys ? Plan::kColumns : Tables<Plan>::kRows];
  Tables<Plan> tables;
};

// Rounds a warp's sums to shared memory, on their way out.
template <int kDim, int kRowTiles, typename Element>
__device__ void stage(const float (&sum)[kRowTiles][kDim / 8][4], float scale, int lane,
                      Element (*rows_smem)[kVectorPitch<Element, kDim>]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(place_of(rows_smem, m * 16 + half * 8 + lane / 4, d * 8 + lane % 4 * 2),
                   sum[m][d][2 * half] * scale, sum[m][d][2 * half + 1] * scale);
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    backward(const FusedProblem<Plan::kRank> problem, const FusedBackward<Plan> arguments) {
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(BackwardSmem<Plan>) == Plan::kSharedBytes,
                "'shared_bytes' in cuneigh/_backends/fused/plan.py counts what BackwardSmem holds");
  auto& smem = dynamic_smem<BackwardSmem<Plan>>();
  auto& tables = smem.tables;

  const int thread = thread_of_block(), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp * 16 * kRowTiles;
  const Columns<Plan> arrays = {arguments.column_key, arguments.column_value,
                                arguments.additional_keys, arguments.additional_values,
                                arguments.statistics};
  fill_tables<Plan>(problem, arrays, arguments.rpb, tables, thread);
  __syncthreads();

  // Boxes of columns arrive in two buffers by turns
  auto load = [&](const ColumnBox<Plan>& columns, int thread, int buffer) {
    const bool has_statistics = Plan::kRowsAreKeys && thread < Plan::kColumns;
    const float2* statistics = nullptr;
    if (has_statistics) statistics = columns.statistics + tables.scalar_steps[thread].statistics;
    const bool exists = columns.exists >> thread % 64 & 1;
    load_columns<Plan>(problem, columns, tables, thread, smem.key[buffer], smem.value[buffer]);
    if (has_statistics) copy_8_bytes(&smem.statistics[buffer][thread], statistics, exists);
    cp_async_commit();
  };
  const int heads = Plan::kRowsAreKeys ? problem.heads / problem.group_size : problem.heads;
  auto entry_of_block = [&] { return Entry{tables.share / heads, tables.share % heads}; };
  {
    const Entry entry = entry_of_block();
    const auto columns = first_columns<Plan>(problem, arrays, tables, warp, entry);
    load_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.row_key, entry, problem.head_dim, tables,
                                               warp, lane, smem.row_key);
    if constexpr (Plan::kGradKey)
      load_rows<Plan::kValueDim, Plan::kValueBytes>(arguments.row_value, entry, problem.value_dim,
                                                    tables, warp, lane, smem.row_value);
    load(columns, thread, 0);
    if constexpr (!Plan::kRowsAreKeys) {
      for (int row = thread; row < Tables<Plan>::kRows; row += Plan::kWarps * 32)
        copy_8_bytes(&smem.statistics[0][row],
                     arguments.statistics.at(entry.batch, tables.token[row], entry.head),
                     tables.token[row][0] >= 0);
      cp_async_commit();
    }
    const auto next = next_columns<Plan>(problem, arrays, tables, warp, columns);
    if (lane == 0) {
      tables.walk[warp][0] = columns;
      tables.walk[warp][1] = next;
    }
  }
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    sign_rows<Plan::kHeadDim, Plan>(problem, smem.row_key, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8
  float grad_key[kRowTiles][Plan::kHeadDim / 8][4] = {};
  float grad_value[kRowTiles][Plan::kValueDim / 8][4] = {};
  const float scale = problem.scale;

  const int given_thread = thread;
  for (int buffer = 0;; buffer ^= 1) {
    const int thread = renewed(given_thread), lane = thread % 32, warp = thread / 32;
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
      const auto after = next_columns<Plan>(problem, arrays, tables, warp, next);
      __syncwarp();
      if (lane == 0) columns = after;
    };
    if (visibility == Visibility::kSome) note_visible<Plan>(problem, columns, tables, warp, lane);
    if (visibility == Visibility::kNone) {
      load_next();
      walk();
      continue;
    }

    // S and P, in the same registers
    float weight[kRowTiles][kColumnTiles][4] = {};
    multiply<Plan::kHeadDim>(&smem.row_key[warp_row], smem.key[buffer], lane, weight);
    load_next();  // behind the reads of this box, which would wait for these writes
    const float factor = kHasBias ? 1.0f : scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        auto visible = Visible<Plan::kColumns>::all();
        if (visibility == Visibility::kSome) visible = {tables.visible[row], lane};
        if constexpr (kHasBias)
          add_bias<Plan>(arguments.rpb, columns, tables, row, half, lane, scale, visible,
                         weight[m]);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = weight[m][n][2 * half + i];
            const float shift = Plan::kRowsAreKeys
                                    ? smem.statistics[buffer][n * 8 + lane % 4 * 2 + i].x
                                    : smem.statistics[0][row].x;
            x = visible(n * 8 + i) ? ex2_approx(fmaf(x, factor, -shift)) : 0.0f;
          }
      }
    }
    if constexpr (!Plan::kGradKey) walk();
    if constexpr (Plan::kGradValue)
      accumulate<Plan::kValueDim>(weight, smem.value[buffer], lane, grad_value);

    // dP and dS; what is hidden stays 0 whatever it is multiplied with
    if constexpr (Plan::kGradKey) {
      float grad_weight[kRowTiles][kColumnTiles][4] = {};
      multiply<Plan::kValueDim>(&smem.row_value[warp_row], smem.value[buffer], lane, grad_weight);
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
      accumulate<Plan::kHeadDim>(weight, smem.key[buffer], lane, grad_key);
    }
  }

  // Every warp writes its rows through its part of the rows' memory
  const int last_lane = renewed(thread) % 32;  // or what the first copies knew of it would be kept
  __syncwarp();
  if constexpr (Plan::kGradKey)
    stage<Plan::kHeadDim>(grad_key, problem.gradient_scale, last_lane, &smem.row_key[warp_row]);
  if constexpr (Plan::kGradValue)
    stage<Plan::kValueDim>(grad_value, 1.0f, last_lane, &smem.row_value[warp_row]);
  __syncwarp();
  constexpr int kRows = kRowTiles * 16;
  const Entry entry = entry_of_block();
  if constexpr (Plan::kGradKey)
    store_rows<Plan::kHeadDim, Plan::kKeyBytes, kRows>(arguments.grad_key, entry, problem.head_dim,
                                                       tables, warp_row, &smem.row_key[warp_row],
                                                       last_lane);
  if constexpr (Plan::kGradValue)
    store_rows<Plan::kValueDim, Plan::kValueBytes, kRows>(arguments.grad_value, entry,
                                                          problem.value_dim, tables, warp_row,
                                                          &smem.row_value[warp_row], last_lane);
}

}  // namespace cuneigh::fused
