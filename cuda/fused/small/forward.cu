// Neighborhood attention of small windows on tensor cores: what a block's queries see lies in
// shared memory at once, and each warp multiplies its sixteen queries with just the keys that they
// see, mostly in one pass.
//
// blockIdx.x: (part of the batch, head, query box).
//
// struct Plan {
//   static constexpr int kRank;               token axes
//   static constexpr int kWarps;              warps of a block; each takes up to 16 queries
//   static constexpr int kBlocks;             blocks of a multiprocessor to leave registers for
//   static constexpr int kColumns;            places for a warp's keys of a slab, up to 256
//   static constexpr bool kWhole;             one slab holds all that a block meets
//   static constexpr bool kLse;               lse is wanted
//   static constexpr int kBuffers;            slabs in shared memory: 1, or 2 by turns
//   static constexpr int kHeadDim, kValueDim; head dimensions: 32, 64 or 128
//   static constexpr int kSides;              entries of HaloTables::below
//   static constexpr int kTableBytes;         of HaloTables, as the launcher counts them
//   static constexpr bool kRowsAreKeys;       false
//   using Element;                            float16 or bfloat16
// };

#include "cuneigh/softmax.cuh"
#include "fused/mma.cuh"
#include "fused/small/small.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct HaloForward {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;
};

// The rows of a block in memory: where each array begins, and the steps to each row.
template <typename Plan>
struct QueryRows {
  struct Steps {
    unsigned query, output, lse;
  };

  Origin<const typename Plan::Element> query;
  Origin<typename Plan::Element> output;
  Origin<float> lse;
  Steps steps[HaloTables<Plan>::kRows];
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    forward(const HaloProblem<Plan::kRank> problem, const HaloForward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  // Dimensions of the output at a time: what registers hold beside the logits. Where a slab is the
  // only one, its weights can be multiplied with one part of the values after another.
  constexpr int kMost = Plan::kLse && Plan::kColumns + Plan::kValueDim > 200 ? 32 : 64;
  constexpr int kPart = Plan::kWhole && Plan::kValueDim > kMost ? kMost : Plan::kValueDim;
  extern __shared__ __align__(128) char memory_smem[];
  auto& smem = *reinterpret_cast<HaloMemory<Plan, Plan::kHeadDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ QueryRows<Plan> rows;
  using Steps = typename QueryRows<Plan>::Steps;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    rows.steps[row] = {steps_to(arguments.query, token), steps_to(arguments.output, token),
                       steps_to(arguments.lse, token)};
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.query = origin_of(arguments.query, head);
    rows.output = origin_of(arguments.output, head);
    rows.lse = origin_of(arguments.lse, head);
  }
  fill_steps<Plan>(problem, arguments.key, arguments.value, arguments.lse, smem);
  fill_lists<Plan>(problem, warp, lane, smem);
  __syncthreads();

  // The rows of an entry come with its first slab, to the buffers for rows by turns
  int row_buffer = 0;
  auto load = [&](const Slab& slab, int buffer, int row_buffer) {
    load_slab(problem, slab, smem, buffer);
    if (slab.is_first())
      load_rows<Plan::kHeadDim, &Steps::query>(entry_of(rows.query, slab.batch),
                                               &rows.steps[warp * 16], lane,
                                               &smem.row[row_buffer][warp * 16], 0);
    cp_async_commit();
  };
  Slab slab = {tables.rows.batch * problem.part, 0, 0};
  load(slab, 0, 0);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8 keys or dimensions
  const int first_row = warp * 16 + lane / 4;
  float output_rmem[kPart / 8][4] = {};
  float shift[2] = {-kLargest, -kLargest};
  // Sums of weights, two for a row. For lse they must be exact; else tensor cores sum the rounded
  // weights, which are what the output is made of, so that its last bits depend on kLse.
  float sum_rmem[4] = {};

  // Normalizes and writes the part of the output that begins at a dimension
  const auto write = [&](int batch, int begin) {
    Element* output = entry_of(rows.output, batch) + begin;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      const auto steps = rows.steps[row];
      const bool exists = tables.exists[row];
      float sum = sum_rmem[2 * half];
      if (Plan::kLse) {
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      }
      store_row<kPart>(output_rmem, half, sum == 0 ? 0.0f : rcp_approx(sum), exists, lane,
                       step_by(output, steps.output));
      if (Plan::kLse && begin == 0 && lane % 4 == 0 && exists)
        *step_by(entry_of(rows.lse, batch), steps.lse) =
            (shift[half] + lg2_approx(sum)) * 0.693147181f;
    }
#pragma unroll
    for (int d = 0; d < kPart / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) output_rmem[d][i] = 0;
  };

  for (int buffer = 0;; buffer ^= Plan::kBuffers - 1) {
    cp_async_wait<0>();
    __syncthreads();
    Slab next = slab;
    bool more;
    if (Plan::kBuffers == 2) {
      more = advance<Plan>(problem, tables, next);
      if (more) load(next, buffer ^ 1, next.is_first() ? row_buffer ^ 1 : row_buffer);
    }

    const unsigned first = smem.first(slab.index, warp);
    if (Plan::kWhole || first != kNothing) {
      const ListAddresses<Plan> addresses(smem.slab_of(buffer), first, tables, lane);

      // S = Q K^T
      float logit_rmem[kColumnTiles][4];
#pragma unroll
      for (int d = 0; d < Plan::kHeadDim; d += 16) {
        unsigned query_rmem[4];
        take_rows(&smem.row[row_buffer][warp * 16], d, lane, query_rmem);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          unsigned key_rmem[4];
          ldmatrix_x4(key_rmem, chunk_of(addresses.across(n * 8), d / 8));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (d == 0)
              mma_m16n8k16_zero(logit_rmem[n + i], query_rmem, key_rmem[2 * i], key_rmem[2 * i + 1],
                                Element());
            else
              mma_m16n8k16(logit_rmem[n + i], query_rmem, key_rmem[2 * i], key_rmem[2 * i + 1],
                           Element());
          }
        }
      }

      // Mask, and the maximum of each row, which four lanes share
      const auto [visible] = smem.visible(slab.index, warp, lane);
      float top[2];
      bool moves = Plan::kWhole;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        top[half] = -infinity<float>();
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = logit_rmem[n][2 * half + i];
            if (!(visible[half] >> (n * 2 + i) & 1)) x = -infinity<float>();
            top[half] = fmaxf(top[half], x);
          }
        top[half] *= problem.scale;
        moves |= top[half] > shift[half] + kSlack;
      }
      if (Plan::kWhole || __any_sync(0xffffffffu, moves)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float highest = top[half];
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
          highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
          if (!Plan::kWhole && !(highest > shift[half] + kSlack)) highest = shift[half];
          highest = fmaxf(highest, -kLargest);
          const float decay = ex2_approx(shift[half] - highest);
          shift[half] = highest;
          if (Plan::kWhole) continue;
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            sum_rmem[i] *= decay;
#pragma unroll
            for (int d = 0; d < Plan::kValueDim / 8; ++d) output_rmem[d][i] *= decay;
          }
        }
      }

      // O += P V, and P times ones
      unsigned weight_rmem[kColumnTiles / 2][4];
#pragma unroll
      for (int begin = 0; begin < Plan::kValueDim; begin += kPart) {
        if (begin > 0) write(slab.batch, begin - kPart);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          unsigned (&weights)[4] = weight_rmem[n / 2];
          if (begin == 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float* logit = &logit_rmem[n + i / 2][i % 2 * 2];
              const float low = ex2_approx(fmaf(logit[0], problem.scale, -shift[i % 2]));
              const float high = ex2_approx(fmaf(logit[1], problem.scale, -shift[i % 2]));
              if (Plan::kLse) sum_rmem[i % 2 * 2] += low + high;
              weights[i] = pack(low, high, Element());
            }
            if (!Plan::kLse)
              mma_m16n8k16(sum_rmem, weights, ones(Element()), ones(Element()), Element());
          }
          const unsigned values = addresses.along(n * 8);
#pragma unroll
          for (int d = 0; d < kPart; d += 16) {
            unsigned value_rmem[4];
            ldmatrix_x4_trans(value_rmem, chunk_of(values, (Plan::kHeadDim + begin + d) / 8));
            mma_m16n8k16(output_rmem[d / 8], weights, value_rmem[0], value_rmem[1], Element());
            mma_m16n8k16(output_rmem[d / 8 + 1], weights, value_rmem[2], value_rmem[3], Element());
          }
        }
      }
    }

    if (Plan::kBuffers == 1) {
      more = advance<Plan>(problem, tables, next);
      __syncthreads();
      if (more) load(next, 0, 0);
    }
    const int batch = slab.batch;
    slab = next;
    if (more && !next.is_first()) continue;
    row_buffer ^= Plan::kBuffers - 1;

    // After the last slab of a batch entry
    write(batch, Plan::kValueDim - kPart);
    shift[0] = shift[1] = -kLargest;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum_rmem[i] = 0;
    if (!more) break;
  }
}

}  // namespace cuneigh::fused::small
