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
//   static constexpr int kColumns;            places for a warp's keys of a slab, up to 128
//   static constexpr bool kWhole;             one slab holds all that a block meets
//   static constexpr int kBuffers;            slabs in shared memory: 1, or 2 by turns
//   static constexpr int kHeadDim, kValueDim; head dimensions: 32 or 64
//   static constexpr int kSides;              entries of HaloTables::below
//   static constexpr int kTableBytes;         of HaloTables, as the launcher counts them
//   static constexpr bool kRowsAreKeys;       false
//   using Element;                            float16 or bfloat16
// };

#include "cuneigh/halo.cuh"
#include "cuneigh/mma.cuh"

namespace cuneigh {

template <typename Plan>
struct HaloForward {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
};

struct QueryStep {
  unsigned query, output, lse;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    halo_forward(const HaloProblem<Plan::kRank> problem, const HaloForward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  extern __shared__ __align__(16) char memory_smem[];
  auto& smem = *reinterpret_cast<HaloMemory<Plan, Plan::kHeadDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ QueryStep steps_smem[HaloTables<Plan>::kRows];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    steps_smem[row] = {step_to<8>(arguments.query, token), step_to<8>(arguments.output, token),
                       step_to<1>(arguments.lse, token)};
  });
  __syncthreads();
  fill_steps<Plan>(problem, arguments.key, arguments.value, arguments.lse, smem);
  __syncthreads();

  auto load = [&](const Slab& slab, int buffer) {
    char* first = smem.column(buffer, 0);
    load_slab<Plan::kHeadDim, 0>(problem, slab, arguments.key, smem, first);
    load_slab<Plan::kValueDim, 1>(problem, slab, arguments.value, smem,
                                  first + Plan::kHeadDim * sizeof(Element));
    load_rows<Plan::kHeadDim, &QueryStep::query>(arguments.query.at(slab.batch, tables.rows.head),
                                                 &steps_smem[warp * 16], lane,
                                                 &smem.row[buffer][warp * 16], 0);
    cp_async_commit();
  };
  Slab slab = first_slab<Plan>(problem, tables);
  load(slab, 0);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8 keys or dimensions
  const int first_row = warp * 16 + lane / 4;
  const float scale = problem.scale * 1.44269504f;  // logits in base 2
  float output_rmem[Plan::kValueDim / 8][4] = {};
  float maximum[2] = {-infinity<float>(), -infinity<float>()}, sum[2] = {};

  List list = list_of<Plan>(problem, slab, tables, warp, lane);
  for (int buffer = 0;; buffer ^= Plan::kBuffers - 1) {
    cp_async_wait<0>();
    __syncthreads();
    Slab next = slab;
    bool more;
    if (Plan::kBuffers == 2) {
      more = advance<Plan>(problem, tables, next);
      if (more) load(next, buffer ^ 1);
    }

    if (!Plan::kWhole && slab.begin != list.begin)
      list = list_of<Plan>(problem, slab, tables, warp, lane);
    if (Plan::kWhole || list.meets) {
      // Where this lane's part of a step of ldmatrix begins, of every sixteen columns: the operands
      // of S are eight columns by sixteen dimensions, those of O sixteen by eight
      const unsigned columns = shared_address(smem.column(buffer, list.first));
      const auto key_of = [&](int n) {
        return columns + tables.list[n * 8 + lane / 16 * 8 + lane % 8] + lane / 8 % 2 * 16;
      };
      const auto value_of = [&](int n) {
        return columns + tables.list[n * 8 + lane % 16] + lane / 16 * 16 + Plan::kHeadDim * 2;
      };

      // S = Q K^T
      float logit_rmem[kColumnTiles][4];
#pragma unroll
      for (int d = 0; d < Plan::kHeadDim; d += 16) {
        unsigned query_rmem[4];
        take_rows(&smem.row[buffer][warp * 16], d, lane, query_rmem);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          unsigned key_rmem[4];
          ldmatrix_x4(key_rmem, key_of(n) + d * 2);
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

      // Softmax, a running one if there are several slabs; four lanes share a row
      float shift[2], decay[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = -infinity<float>();
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = logit_rmem[n][2 * half + i];
            if (!(list.visible[half] >> (n * 2 + i) & 1)) x = -infinity<float>();
            top = fmaxf(top, x);
          }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = Plan::kWhole ? top * scale : fmaxf(maximum[half], top * scale);
        shift[half] = top == -infinity<float>() ? 0.0f : top;
        decay[half] = Plan::kWhole ? 0.0f : ex2_approx(maximum[half] - shift[half]);
        maximum[half] = top;
        sum[half] = Plan::kWhole ? 0.0f : sum[half] * decay[half];
      }
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          output_rmem[d][i] = Plan::kWhole ? 0.0f : output_rmem[d][i] * decay[i / 2];

      // O += P V
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        unsigned weight_rmem[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* logit = &logit_rmem[n + i / 2][i % 2 * 2];
          const float low = ex2_approx(fmaf(logit[0], scale, -shift[i % 2]));
          const float high = ex2_approx(fmaf(logit[1], scale, -shift[i % 2]));
          sum[i % 2] += low + high;
          weight_rmem[i] = pack(low, high, Element());
        }
        const unsigned values = value_of(n);
#pragma unroll
        for (int d = 0; d < Plan::kValueDim; d += 16) {
          unsigned value_rmem[4];
          ldmatrix_x4_trans(value_rmem, values + d * 2);
          mma_m16n8k16(output_rmem[d / 8], weight_rmem, value_rmem[0], value_rmem[1], Element());
          mma_m16n8k16(output_rmem[d / 8 + 1], weight_rmem, value_rmem[2], value_rmem[3],
                       Element());
        }
      }
    }

    if (Plan::kBuffers == 1) {
      more = advance<Plan>(problem, tables, next);
      __syncthreads();
      if (more) load(next, 0);
    }
    const int batch = slab.batch;
    slab = next;
    if (more && next.batch == batch) continue;

    // After the last slab of a batch entry: normalize and write
    Element* output = arguments.output.at(batch, tables.rows.head);
    float* lse = arguments.lse.at(batch, tables.rows.head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      const bool exists = tables.exists[row];
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      store_row<Plan::kValueDim>(output_rmem, half, total == 0 ? 0.0f : __fdividef(1, total),
                                 exists, lane, step_by(output, steps_smem[row].output));
      if (arguments.lse.data && lane % 4 == 0 && exists)
        lse[steps_smem[row].lse] = (maximum[half] + lg2_approx(total)) * 0.693147181f;
      if (!Plan::kWhole) maximum[half] = -infinity<float>();
      if (!Plan::kWhole) sum[half] = 0;
    }
    if (!Plan::kWhole) {
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_rmem[d][i] = 0;
    }
    if (!more) break;
  }
}

}  // namespace cuneigh
