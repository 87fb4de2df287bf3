// Neighborhood attention in one pass on tensor cores (after FlashAttention-2): a block takes a box
// of queries, walks over the boxes of keys that cover the union of their windows, and keeps a
// running softmax. Each warp skips a box of keys that none of its queries sees, and masks only one
// that some of them do not see whole.
//
// blockIdx.x: (batch, head, query box).
//
// struct Plan {
//   static constexpr int kRank;                  token axes
//   static constexpr int kWarps, kRowTiles;      warps of a block, and sixteens of queries of a
//   warp static constexpr int kBlocks;                blocks on a multiprocessor to leave registers
//   for static constexpr int kColumns;               keys of a box, a multiple of 16 up to 64; of 8
//   for
//                                                float32
//   static constexpr int kHeadDim, kValueDim;    head dimensions, padded to multiples of 16
//   static constexpr bool kKeyExact, kValueExact; they needed no padding
//   static constexpr int kKeyBytes, kValueBytes; widths of the loads that the alignment allows
//   static constexpr int kSharedBytes;           of ForwardSmem, as the launcher counts them
//   static constexpr bool kRowsAreKeys;          false
//   using Element;                               float16, bfloat16 or float32
//   using Bias;                                  dtype of rpb, or void when there is none
// };

#include "cuneigh/async.cuh"
#include "cuneigh/boxes.cuh"
#include "cuneigh/fused.cuh"
#include "cuneigh/products.cuh"

namespace cuneigh {

template <typename Plan>
struct FusedForward {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<const typename Plan::Element, Plan::kRank> additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
};

template <typename Plan>
struct ForwardSmem {
  using Element = typename Plan::Element;
  static constexpr int kQueryDim =
      Plan::kHeadDim > Plan::kValueDim ? Plan::kHeadDim : Plan::kValueDim;

  Element query[Tables<Plan>::kRows][kPitchOf<Element, kQueryDim>];  // in the end the output
  Element key[2][Plan::kColumns][kPitchOf<Element, Plan::kHeadDim>];
  Element value[2][Plan::kColumns][kPitchOf<Element, Plan::kValueDim>];
  Tables<Plan> tables;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    fused_forward(const FusedProblem<Plan::kRank> problem, const FusedForward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kRank = Plan::kRank;
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(ForwardSmem<Plan>) == Plan::kSharedBytes,
                "'forward_bytes' in cuneigh/_fused_plan.py counts what ForwardSmem holds");
  extern __shared__ __align__(16) char memory_smem[];
  auto& smem = *reinterpret_cast<ForwardSmem<Plan>*>(memory_smem);
  auto& tables = smem.tables;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowBox<kRank> rows = row_box<Plan>(problem);
  fill_tables<Plan>(problem, rows, arguments.key, arguments.value, arguments.lse, arguments.rpb,
                    tables);
  __syncthreads();

  // Boxes of keys and values arrive in two buffers by turns
  auto load = [&](const ColumnBox<kRank>& keys, int buffer) {
    load_columns<Plan::kHeadDim, Plan::kKeyBytes, Plan::kKeyExact, &ColumnPlace::first>(
        problem, rows, keys, arguments.key, arguments.additional_keys, problem.head_dim, tables,
        smem.key[buffer]);
    load_columns<Plan::kValueDim, Plan::kValueBytes, Plan::kValueExact, &ColumnPlace::second>(
        problem, rows, keys, arguments.value, arguments.additional_values, problem.value_dim,
        tables, smem.value[buffer]);
    cp_async_commit();
  };
  ColumnBox<kRank> next = first_columns<Plan>(problem, rows, tables);
  load_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.query, rows, problem.head_dim, tables,
                                             smem.query);
  load(next, 0);
  if (problem.sign != 1) {
    cp_async_wait<0>();
    __syncthreads();
    sign_rows<Plan::kHeadDim, Plan>(problem, smem.query, warp, lane);
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8 keys or dimensions
  const int warp_row = warp * 16 * kRowTiles, first_row = warp_row + lane / 4;
  float output_rmem[kRowTiles][Plan::kValueDim / 8][4] = {};
  float maximum[kRowTiles][2], sum[kRowTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) maximum[m][0] = maximum[m][1] = -infinity<float>();
  const float scale = problem.scale * 1.44269504f;  // logits in base 2

  bool more = true;
  for (int buffer = 0; more; buffer ^= 1) {
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    const ColumnBox<kRank> keys = next;
    cp_async_wait<0>();
    __syncthreads();
    more = advance<Plan>(problem, tables, next);
    if (more) load(next, buffer ^ 1);

    const Visibility visibility = visibility_of<Plan>(problem, keys, tables, warp);
    if (visibility == Visibility::kNone) continue;

    // S = Q K^T
    float logit_rmem[kRowTiles][kColumnTiles][4] = {};
    multiply<Plan::kHeadDim>(&smem.query[warp_row], smem.key[buffer], lane, logit_rmem);

    // Bias and mask
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + half * 8;
        unsigned long long visible = ~0ull;
        if (visibility == Visibility::kSome)
          visible = visible_columns<Plan>(problem, keys, tables, row, lane);
        if constexpr (kHasBias)
          add_bias<Plan>(arguments.rpb, rows, keys, tables, row, half, lane, scale, visible,
                         logit_rmem[m]);
        if (visibility == Visibility::kSome) {
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(visible >> (n * 8 + i) & 1))
                logit_rmem[m][n][2 * half + i] = -infinity<float>();
        }
      }
    }

    // Running softmax; four lanes share a row. The rows go side by side: a chain alone is slow
    const float factor = kHasBias ? 1.0f : scale;
    float shift[kRowTiles][2], decay[kRowTiles][2];
    bool moved = false;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float pair = fmaxf(logit_rmem[m][n][2 * half], logit_rmem[m][n][2 * half + 1]);
          shift[m][half] = n == 0 ? pair : fmaxf(shift[m][half], pair);
        }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = shift[m][half];
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(maximum[m][half], top * factor);
        shift[m][half] = top == -infinity<float>() ? 0.0f : top;
        decay[m][half] = ex2_approx(maximum[m][half] - shift[m][half]);
        maximum[m][half] = top;
        sum[m][half] *= decay[m][half];
        moved |= decay[m][half] != 1.0f;
      }
    // The maximum seldom moves after the first boxes
    if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int d = 0; d < Plan::kValueDim / 8; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) output_rmem[m][d][i] *= decay[m][i / 2];
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = logit_rmem[m][n][i];
          weight = ex2_approx(fmaf(weight, factor, -shift[m][i / 2]));
          sum[m][i / 2] += weight;
        }

    // O += P V
    accumulate<Plan::kValueDim>(logit_rmem, smem.value[buffer], lane, output_rmem);
  }

  // Normalize, and write each warp's rows through its part of the queries' memory
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8;
      float total = sum[m][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float normalizer = total == 0 ? 0.0f : 1 / total;
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
        store_pair(&smem.query[row][d * 8 + lane % 4 * 2], output_rmem[m][d][2 * half] * normalizer,
                   output_rmem[m][d][2 * half + 1] * normalizer);
      const auto& token = tables.token[row];
      if (arguments.lse.data && lane % 4 == 0 && token[0] >= 0)
        *arguments.lse.at(rows.batch, token, rows.head) =
            total == 0 ? -infinity<float>() : maximum[m][half] * 0.693147181f + logf(total);
    }
  }
  __syncwarp();
  store_rows<Plan::kValueDim, Plan::kValueBytes>(arguments.output, rows, problem.value_dim, tables,
                                                 smem.query, warp, lane);
}

}  // namespace cuneigh
