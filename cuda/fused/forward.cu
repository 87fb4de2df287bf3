// Neighborhood attention in one pass on tensor cores, after FlashAttention-2. For each query:
//
//   S = scale * Q K^T + rpb, over the keys of its window and the additional keys
//   O = softmax(S) V,   lse = log(sum(exp(S)))
//
// A block takes a box of queries, walks over the boxes of keys that cover the union of their
// windows, and keeps a running softmax. Each warp skips a box of keys that none of its queries
// sees, and masks only a box that some of its queries do not see whole. problem.cuh defines the
// words.
//
// A block fills its tables once for several batch-heads, which it works through one after another.
// What the next one begins with is copied while the last box of this one is worked on.
//
// blockIdx.x: (which of the batch-heads, box of queries).
//
// struct Plan {
//   static constexpr int kRank;                   token axes
//   static constexpr int kWarps;                  warps of a block
//   static constexpr int kRowTiles;               sixteens of queries of a warp
//   static constexpr int kBlocks;                 blocks of a multiprocessor to leave registers for
//   static constexpr int kColumns;                slots of a box of keys, up to 64: a multiple of
//                                                 16, in float32 of 8
//   static constexpr int kHeadDim, kValueDim;     head dimensions, padded to multiples of 16
//   static constexpr bool kKeyExact, kValueExact; they needed no padding
//   static constexpr int kKeyBytes, kValueBytes;  widths of the loads that the alignment allows
//   static constexpr int kSharedBytes;            of ForwardSmem, as the launcher counts them
//   static constexpr bool kRowsAreKeys;           false
//   static constexpr bool kAdditional;            whether there are additional keys
//   static constexpr bool kKeyMask;               whether keys may be hidden
//   static constexpr bool kManyBatchHeads;        whether a block works through more than one
//   using Element;                                float16, bfloat16 or float32
//   using Bias;                                   dtype of rpb, or void when there is none
// };

#include "cuneigh/warp_softmax.cuh"
#include "fused/bias.cuh"
#include "fused/products.cuh"
#include "fused/row_copies.cuh"
#include "fused/thread.cuh"
#include "fused/walk.cuh"

namespace cuneigh::fused {

template <typename Plan>
struct ForwardArguments : KeyMask<Plan> {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<const typename Plan::Element, Plan::kRank> additional_keys, additional_values;
  View<const typename Plan::Bias, Plan::kRank> rpb;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
};

template <typename Plan>
struct ForwardSmem {
  using Element = typename Plan::Element;
  static constexpr int kRows = Tables<Plan>::kRows;
  static constexpr int kQkPitch = kVectorPitch<Element, Plan::kHeadDim>;
  static constexpr int kVoPitch = kVectorPitch<Element, Plan::kValueDim>;
  Element query[kRows][kQkPitch];              // [kRows, kHeadDim]
  Element key[2][Plan::kColumns][kQkPitch];    // of two boxes: [kColumns, kHeadDim]
  Element value[2][Plan::kColumns][kVoPitch];  // of two boxes: [kColumns, kValueDim]
  Tables<Plan> tables;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    forward(const FusedProblem<Plan::kRank> problem, const ForwardArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kRank = Plan::kRank;
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(ForwardArguments<Plan>) == (8 + Plan::kKeyMask) * sizeof(View<float, kRank>),
                "`forward` in cuneigh/_backends/fused/launch.py packs these views");
  static_assert(sizeof(ForwardSmem<Plan>) == Plan::kSharedBytes,
                "`shared_bytes` in cuneigh/_backends/fused/plan.py counts what ForwardSmem holds");
  auto& smem = dynamic_smem<ForwardSmem<Plan>>();
  auto& tables = smem.tables;

  const int thread = thread_in_block();
  __builtin_assume(thread >= 0);
  const int lane = thread % 32, warp = thread / 32;
  const Columns<Plan> arrays = {
      arguments.key, arguments.value, arguments.additional_keys, arguments.additional_values, {}};
  fill_tables<Plan>(problem, arrays, arguments.rpb, arguments, tables, thread);
  __syncthreads();

  // Boxes of keys and values arrive in two buffers by turns
  auto load = [&](const ColumnBox<Plan>& keys, int thread, int buffer) {
    load_columns<Plan>(problem, keys, tables, thread, smem.key[buffer], smem.value[buffer]);
    cp_async_commit();
  };
  // Begins a batch-head: its queries take the place of those of the one before
  auto start = [&](int number, int thread, int buffer) {
    const int lane = thread % 32, warp = thread / 32;
    const BatchHead rows = {number / problem.heads, number % problem.heads};
    const auto keys = first_box<Plan>(problem, arrays, arguments, tables, warp, rows);
    __syncwarp();  // all lanes have read the queries of the batch-head before
    load_rows<Plan::kHeadDim, Plan::kKeyBytes>(arguments.query, rows, problem.head_dim, tables,
                                               warp, lane, smem.query);
    __syncwarp();
    if (lane == 0) tables.walk[warp][buffer] = keys;
    __syncwarp();
  };
  int number = tables.share * problem.batch_heads;
  const int end = smaller(number + problem.batch_heads, problem.batch * problem.heads);
  start(number, thread, 0);
  load(tables.walk[warp][0], thread, 0);
  const auto second =
      next_box<Plan>(problem, arrays, arguments, tables, warp, tables.walk[warp][0]);
  if (lane == 0) tables.walk[warp][1] = second;

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) and the
  // one after of every 8 keys or dimensions
  const float scale = problem.scale;
  const int given_thread = thread;
  for (int buffer = 0;; ++number) {
    float output_rmem[kRowTiles][Plan::kValueDim / 8][4] = {};  // O [kRowTiles * 16, kValueDim]
    WarpSoftmax<kRowTiles> softmax;
    if (problem.sign != 1) {
      cp_async_wait<0>();
      __syncwarp();
      multiply_by_sign<Plan::kHeadDim, Plan>(problem, smem.query, warp, lane);
    }

    for (bool last = false; !last; buffer ^= 1) {
      // Where sums fill the registers, or several blocks share them, what a thread knows of itself
      // is not kept
      constexpr bool kRoom = Plan::kBlocks == 1 && kRowTiles * kColumnTiles < 16;
      const int thread = kRoom ? given_thread : forgotten(given_thread);
      const int lane = thread % 32, warp = thread / 32;
      const int warp_row = warp * 16 * kRowTiles, first_row = warp_row + lane / 4;
      // This box has arrived, and everyone is done with the one before, whose memory the next takes
      cp_async_wait<0>();
      __syncthreads();
      ColumnBox<Plan>& keys = tables.walk[warp][buffer];
      const ColumnBox<Plan>& next = tables.walk[warp][buffer ^ 1];
      const Visibility visibility = keys.visibility;
      auto load_next = [&] {
        last = next.past_end;
        if (last) {
          if (!Plan::kManyBatchHeads || number + 1 == end) return;
          start(number + 1, forgotten(thread), buffer ^ 1);
        }
        load(next, thread, buffer ^ 1);
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

      // S = Q K^T
      float logit_rmem[kRowTiles][kColumnTiles][4] = {};  // S [kRowTiles * 16, kColumns]
      gemm_nt<Plan::kHeadDim>(&smem.query[warp_row], smem.key[buffer], lane, logit_rmem);

      load_next();  // behind the reads of this box, which would wait for these writes

      // S = scale * S + rpb, and S = -inf outside of windows
      if (kHasBias || visibility == Visibility::kSome) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = first_row + m * 16 + half * 8;
            auto visible = LaneMask<Plan::kColumns>::all();
            if (visibility == Visibility::kSome) visible = {tables.row_mask[row], lane};
            if constexpr (kHasBias)
              add_bias<Plan>(arguments.rpb, keys, tables, row, half, lane, scale, visible,
                             logit_rmem[m]);
#pragma unroll
            for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (!visible(n * 8 + i)) logit_rmem[m][n][2 * half + i] = -infinity<float>();
          }
        }
      }

      // P = exp(S - row_max), with the scale where no bias brought it
      const float factor = kHasBias ? 1.0f : scale;
      softmax.rescale(logit_rmem, factor, output_rmem);
      walk();
      softmax.exponentiate(logit_rmem, factor);

      // O += P V
      gemm_nn<Plan::kValueDim>(logit_rmem, smem.value[buffer], lane, output_rmem);
    }

    // O /= sum(P). A few rows of each warp at a time go out through the memory of the last values
    constexpr int kRowsAtOnce =
        Plan::kColumns < 8 * Plan::kWarps ? Plan::kColumns / Plan::kWarps : 8;
    const int thread = forgotten(given_thread), lane = thread % 32, warp = thread / 32;
    auto* rows_smem = &smem.value[buffer ^ 1][warp * kRowsAtOnce];  // [kRowsAtOnce, kValueDim]
    const BatchHead rows = {number / problem.heads, number % problem.heads};
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first_row = (warp * kRowTiles + m) * 16 + half * 8, row = first_row + lane / 4;
        const float sum = softmax.sum(m, half);
        const float normalizer = softmax.normalizer(sum);
#pragma unroll
        for (int i = 0; i < 8; i += kRowsAtOnce) {
          if (lane / 4 / kRowsAtOnce * kRowsAtOnce == i) {
#pragma unroll
            for (int d = 0; d < Plan::kValueDim / 8; ++d)
              store_pair(element_of(rows_smem, lane / 4 % kRowsAtOnce, d * 8 + lane % 4 * 2),
                         output_rmem[m][d][2 * half] * normalizer,
                         output_rmem[m][d][2 * half + 1] * normalizer);
          }
          __syncwarp();
          store_rows<Plan::kValueDim, Plan::kValueBytes, kRowsAtOnce>(
              arguments.output, rows, problem.value_dim, tables, first_row + i, rows_smem, lane);
          __syncwarp();
        }
        const auto& token = tables.token[row];
        if (arguments.lse.data && lane % 4 == 0 && token[0] >= 0)
          *arguments.lse.at(rows.batch, token, rows.head) = softmax.lse(m, half, sum);
      }
    }
    if (!Plan::kManyBatchHeads || number + 1 == end) break;
  }
}

}  // namespace cuneigh::fused
