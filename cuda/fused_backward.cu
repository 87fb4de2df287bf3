// The gradients of neighborhood attention in one pass each on tensor cores, the logits recomputed:
//
//   rows are queries:  S = Q K^T, dP = dO V^T, dQ = scale * dS K
//   rows are keys:     S = K Q^T, dP = V dO^T, dK = scale * dS Q, dV = P dO
//
// with P = exp(scale * S + rpb - lse) and dS = P * (dP - delta). A block takes a box of rows and
// walks over the boxes of columns that they meet: the window of queries, the inverse window of
// keys, in every query head that shares them. No atomics, so that the sums never change.
//
// blockIdx.x: (batch, head, box of rows). The plan is that of fused_forward.cu, with kSharedBytes
// that of BackwardSmem and
//
//   static constexpr bool kGradKey, kGradValue;  which gradients to compute: dQ or dK, and dV. Long
//                                                dK and dV are too many registers for one kernel

#include "cuneigh/async.cuh"
#include "cuneigh/boxes.cuh"
#include "cuneigh/fused.cuh"
#include "cuneigh/products.cuh"

namespace cuneigh {

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
                 [kPitchOf<Element, Plan::kHeadDim>];  // in the end the gradients
  Element row_value[Tables<Plan>::kRows][kPitchOf<Element, Plan::kValueDim>];
  Element key[2][Plan::kColumns][kPitchOf<Element, Plan::kHeadDim>];
  Element value[2][Plan::kColumns][kPitchOf<Element, Plan::kValueDim>];
  float2 statistics[2][Plan::kColumns];
  Tables<Plan> tables;
};

// Rounds a warp's sums to shared memory, on their way out.
template <int kDim, int kRowTiles, typename Element>
__device__ void stage(const float (&sum)[kRowTiles][kDim / 8][4], float scale, int lane,
                      Element (*rows_smem)[kPitchOf<Element, kDim>]) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(&rows_smem[m * 16 + half * 8 + lane / 4][d * 8 + lane % 4 * 2],
                   sum[m][d][2 * half] * scale, sum[m][d][2 * half + 1] * scale);
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    fused_backward(const FusedProblem<Plan::kRank> problem, const FusedBackward<Plan> arguments) {
  constexpr int kRank = Plan::kRank;
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(BackwardSmem<Plan>) == Plan::kSharedBytes,
                "'backward_bytes' in cuneigh/_fused_plan.py counts what BackwardSmem holds");
  extern __shared__ __align__(16) char memory_smem[];
  auto& smem = *reinterpret_cast<BackwardSmem<Plan>*>(memory_smem);
  auto& tables = smem.tables;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp * 16 * kRowTiles;
  const RowBox<kRank> rows = row_box<Plan>(problem);
  fill_tables<Plan>(problem, rows, arguments.column_key, arguments.column_value,
                    arguments.statistics, arguments.rpb, tables);
  __syncthreads();

  // Boxes of columns arrive in two buffers by turns
  auto load = [&](const ColumnBox<kRank>& columns, int buffer) {
    load_columns<Plan::kHeadDim, Plan::kKeyBytes, Plan::kKeyExact, &ColumnPlace::first>(
        problem, rows, columns, arguments.column_key, arguments.additional_keys, problem.head_dim,
        tables, smem.key[buffer]);
    load_columns<Plan::kValueDim, Plan::kValueBytes, Plan::kValueExact, &ColumnPlace::second>(
        problem, rows, columns, arguments.column_value, arguments.additional_values,
        problem.value_dim, tables, smem.value[buffer]);
    if (Plan::kRowsAreKeys && threadIdx.x < Plan::kColumns) {
      const bool exists = columns.exists >> threadIdx.x & 1;
      const float2* first = first_of<Plan>(problem, rows, columns, arguments.statistics);
      copy_8_bytes(&smem.statistics[buffer][threadIdx.x],
                   first + tables.place[threadIdx.x].statistics, exists);
    }
    cp_async_commit();
  };
  ColumnBox<kRank> next = first_columns<Plan>(problem, rows, tables);
  load_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.row_key, rows, problem.head_dim, tables,
                                             smem.row_key);
  if constexpr (Plan::kGradKey)
    load_rows<Plan::kValueDim, Plan::kValueBytes>(arguments.row_value, rows, problem.value_dim,
                                                  tables, smem.row_value);
  load(next, 0);
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    sign_rows<Plan::kHeadDim, Plan>(problem, smem.row_key, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8
  float grad_key[kRowTiles][Plan::kHeadDim / 8][4] = {};
  float grad_value[kRowTiles][Plan::kValueDim / 8][4] = {};
  float2 row_statistics[kRowTiles][2] = {};
  if constexpr (!Plan::kRowsAreKeys) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& token = tables.token[warp_row + m * 16 + half * 8 + lane / 4];
        if (token[0] >= 0)
          row_statistics[m][half] = *arguments.statistics.at(rows.batch, token, rows.head);
      }
  }
  const float scale = problem.scale * 1.44269504f;  // logits in base 2

  bool more = true;
  for (int buffer = 0; more; buffer ^= 1) {
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    const ColumnBox<kRank> columns = next;
    cp_async_wait<0>();
    __syncthreads();
    more = advance<Plan>(problem, tables, next);
    if (more) load(next, buffer ^ 1);
    const Visibility visibility = visibility_of<Plan>(problem, columns, tables, warp);
    if (visibility == Visibility::kNone) continue;

    // S and P, in the same registers
    float weight[kRowTiles][kColumnTiles][4] = {};
    multiply<Plan::kHeadDim>(&smem.row_key[warp_row], smem.key[buffer], lane, weight);
    const float factor = kHasBias ? 1.0f : scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        unsigned long long visible = ~0ull;
        if (visibility == Visibility::kSome)
          visible = visible_columns<Plan>(problem, columns, tables, row, lane);
        if constexpr (kHasBias)
          add_bias<Plan>(arguments.rpb, rows, columns, tables, row, half, lane, scale, visible,
                         weight[m]);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = weight[m][n][2 * half + i];
            const float shift = Plan::kRowsAreKeys
                                    ? smem.statistics[buffer][n * 8 + lane % 4 * 2 + i].x
                                    : row_statistics[m][half].x;
            x = visible >> (n * 8 + i) & 1 ? ex2_approx(fmaf(x, factor, -shift)) : 0.0f;
          }
      }
    }
    if constexpr (Plan::kGradValue)
      accumulate<Plan::kValueDim>(weight, smem.value[buffer], lane, grad_value);
    if constexpr (!Plan::kGradKey) continue;

    // dP and dS; what is hidden stays 0 whatever it is multiplied with
    float grad_weight[kRowTiles][kColumnTiles][4] = {};
    multiply<Plan::kValueDim>(&smem.row_value[warp_row], smem.value[buffer], lane, grad_weight);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float delta = Plan::kRowsAreKeys
                                  ? smem.statistics[buffer][n * 8 + lane % 4 * 2 + i % 2].y
                                  : row_statistics[m][i / 2].y;
          const float p = weight[m][n][i];
          weight[m][n][i] = p == 0 ? 0.0f : p * (grad_weight[m][n][i] - delta);
        }
    accumulate<Plan::kHeadDim>(weight, smem.key[buffer], lane, grad_key);
  }

  // Every warp writes its rows through its part of the rows' memory
  __syncwarp();
  if constexpr (Plan::kGradKey)
    stage<Plan::kHeadDim>(grad_key, problem.gradient_scale, lane, &smem.row_key[warp_row]);
  if constexpr (Plan::kGradValue)
    stage<Plan::kValueDim>(grad_value, 1.0f, lane, &smem.row_value[warp_row]);
  __syncwarp();
  if constexpr (Plan::kGradKey)
    store_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.grad_key, rows, problem.head_dim, tables,
                                                smem.row_key, warp, lane);
  if constexpr (Plan::kGradValue)
    store_rows<Plan::kValueDim, Plan::kValueBytes>(arguments.grad_value, rows, problem.value_dim,
                                                   tables, smem.row_value, warp, lane);
}

}  // namespace cuneigh
