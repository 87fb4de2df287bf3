// Neighborhood attention of small windows and its tangent in one pass on tensor cores. Where every
// operand moves along its tangent, for each query:
//
//   S = scale * Q K^T,   dS = scale * (dQ K^T + Q dK^T), over the keys of its window
//   P = exp(S - max),    O = P V / sum(P),   lse = log(sum(exp(S)))
//   dlse = sum(P dS) / sum(P),   dO = (P dS V + P dV) / sum(P) - dlse O
//
// The walk is that of fused/small/forward.cu. One stage holds the window union of a block, so that
// a weight is never larger than 1 and P dS has room in float16. Of the two buffers for stages and
// rows in shared memory the first is for the arrays and the second for their tangents, of which
// those of keys and values lie in global memory like the arrays.
//
// blockIdx.x: (which elements of the batch, head, box of queries). The plan is that of
// fused/small/forward.cu, with kOneStage, kLse and two kBuffers.

#include "fused/small/hidden.cuh"
#include "fused/small/softmax.cuh"
#include "fused/small/tiles.cuh"
#include "fused/small/warp_rows.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct JvpArguments : KeyMask<Plan> {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  Vectors query, key, value;
  Vectors d_query, d_key, d_value;
  View<typename Plan::Element, Plan::kRank> output, d_output;  // alike; one of them may be null
  View<float, Plan::kRank> lse, d_lse;                         // alike; may be null
};

// Where the rows of a block lie in global memory, as `QueryRows` of forward.cu has them, and the
// tangents of its columns.
template <typename Plan>
struct MovingRows {
  struct Offsets {
    unsigned query, d_query, output, lse;
  };
  using Element = typename Plan::Element;

  Origin<const Element> query, d_query, d_key, d_value;
  Origin<Element> output, d_output;
  Origin<float> lse, d_lse;
  Offsets offsets[SmallTables<Plan>::kRows];
};

// Weights P of sixteen columns and P dS, as left operands; the sums of both grow. P dS is 0 where P
// is 0, whatever dS is.
template <typename Plan>
__device__ void exponentiate(TileSoftmax<Plan>& softmax, const float (*logit)[4],
                             const float (*d_logit)[4], float scale, unsigned (&weight)[4],
                             unsigned (&d_weight)[4], float (&d_sum)[2]) {
  using Element = typename Plan::Element;
  const float d_scale = scale * kLn2;  // from base 2 to the natural one
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i % 2;
    float p[2], d[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      p[j] = ex2_approx(fmaf(logit[i / 2][half * 2 + j], scale, -softmax.row_max[half]));
      d[j] = p[j] == 0 ? 0.0f : p[j] * (d_scale * d_logit[i / 2][half * 2 + j]);
    }
    softmax.row_sum[half * 2] += p[0] + p[1];
    d_sum[half] += d[0] + d[1];
    weight[i] = pack(p[0], p[1], Element());
    d_weight[i] = pack(d[0], d[1], Element());
  }
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    jvp(const SmallWindowProblem<Plan::kRank> problem, const JvpArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  static_assert(
      sizeof(JvpArguments<Plan>) == (10 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`jvp` in cuneigh/_backends/fused/tangents.py packs these views");
  static_assert(Plan::kOneStage && Plan::kLse && Plan::kBuffers == 2);
  // Dimensions of O and dO at a time: what registers hold beside the weights
  constexpr int kPart = Plan::kColumns * Plan::kBlocks > 256 ? 16 : 32;
  extern __shared__ __align__(128) char memory_smem[];
  auto& smem = *reinterpret_cast<SmallSmem<Plan, Plan::kHeadDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ MovingRows<Plan> rows;
  using Offsets = typename MovingRows<Plan>::Offsets;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_row_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    const bool has_output = arguments.output.data, has_lse = arguments.lse.data;
    rows.offsets[row] = {offset_of(arguments.query, token), offset_of(arguments.d_query, token),
                         offset_of(has_output ? arguments.output : arguments.d_output, token),
                         offset_of(has_lse ? arguments.lse : arguments.d_lse, token)};
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.query = origin_of_rows(arguments.query, head);
    rows.d_query = origin_of_rows(arguments.d_query, head);
    rows.d_key = origin_of_columns<Plan>(problem, arguments.d_key, tables);
    rows.d_value = origin_of_columns<Plan>(problem, arguments.d_value, tables);
    rows.output = origin_of_rows(arguments.output, head);
    rows.d_output = origin_of_rows(arguments.d_output, head);
    rows.lse = origin_of_rows(arguments.lse, head);
    rows.d_lse = origin_of_rows(arguments.d_lse, head);
  }
  if constexpr (kMaskedColumns<Plan>)
    fill_column_tables<Plan>(problem, arguments.key, arguments.value, arguments.key_mask, smem);
  else
    fill_column_tables<Plan>(problem, arguments.key, arguments.value, arguments.lse, smem);
  SeenColumns<Plan> seen;
  seen.begin(problem, arguments, smem);
  fill_tiles<Plan>(problem, warp, lane, smem);
  __syncthreads();

  auto load = [&](const StageOf& stage) {
    const int thread = forgotten(threadIdx.x), lane = thread % 32, warp = thread / 32;
    load_stage(problem, stage, tables.qk, tables.vo, smem, 0, thread);
    load_stage(problem, stage, rows.d_key, rows.d_value, smem, 1, thread);
    const Offsets* offsets = &rows.offsets[warp * 16];
    load_warp_rows<Plan::kHeadDim, &Offsets::query>(in_batch(rows.query, stage.batch), offsets,
                                                    lane, &smem.row[0][warp * 16], 0);
    load_warp_rows<Plan::kHeadDim, &Offsets::d_query>(in_batch(rows.d_query, stage.batch), offsets,
                                                      lane, &smem.row[1][warp * 16], 0);
    cp_async_commit();
  };
  StageOf stage = {tables.rows.batch * problem.batch_heads, 0, 0};
  load(stage);

  for (bool more = true; more;) {
    const int thread = forgotten(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const unsigned first = smem.tile(0, warp);
    const unsigned to_tangents = tables.stage_bytes;  // from a column to its tangent
    seen.look(problem, stage, smem);
    cp_async_wait<0>();
    const Hidden hidden = seen.wait(problem, arguments, stage, smem, 0, kBoth, 2);
    const TileAddresses<Plan> tile(smem.stage_address(0), first, tables.tile_offset, lane);

    // S = Q K^T,  dS = dQ K^T + Q dK^T. Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are
    // this thread's, in columns 2 * (lane % 4) and the one after of every 8 keys or dimensions
    float logit_rmem[kColumnTiles][4];    // S [16, kColumns]
    float d_logit_rmem[kColumnTiles][4];  // dS [16, kColumns]
#pragma unroll
    for (int d = 0; d < Plan::kHeadDim; d += 16) {
      unsigned query_rmem[4], d_query_rmem[4];  // Q[:, d : d + 16] and dQ
      load_row_operand(&smem.row[0][warp * 16], d, lane, query_rmem);
      load_row_operand(&smem.row[1][warp * 16], d, lane, d_query_rmem);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        unsigned key_rmem[4], d_key_rmem[4];  // K[8 * n : 8 * n + 16, d : d + 16] and dK
        const unsigned keys = chunk_address(tile.nt(n * 8), d / 8);
        ldmatrix_x4(key_rmem, keys);
        ldmatrix_x4(d_key_rmem, keys + to_tangents);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned low = key_rmem[2 * i], high = key_rmem[2 * i + 1];
          if (d == 0) {
            mma_m16n8k16_zero(logit_rmem[n + i], query_rmem, low, high, Element());
            mma_m16n8k16_zero(d_logit_rmem[n + i], d_query_rmem, low, high, Element());
          } else {
            mma_m16n8k16(logit_rmem[n + i], query_rmem, low, high, Element());
            mma_m16n8k16(d_logit_rmem[n + i], d_query_rmem, low, high, Element());
          }
          mma_m16n8k16(d_logit_rmem[n + i], query_rmem, d_key_rmem[2 * i], d_key_rmem[2 * i + 1],
                       Element());
        }
      }
    }

    TileSoftmax<Plan> softmax;
    float output_rmem[kPart / 8][4] = {};    // kPart dimensions of P V [16, kValueDim]
    float d_output_rmem[kPart / 8][4] = {};  // kPart dimensions of P dS V + P dV
    float d_sum[2] = {};                     // sum(P dS) of this lane's columns
    LaneMasks<Plan> visible = smem.visible(0, warp, lane);
    if (hidden) visible &= seen.of_tile(smem, first);
    softmax.rescale(logit_rmem, visible, problem.scale, output_rmem);

    // O /= sum(P), and dO likewise: writes the parts from the dimension `begin` on
    const auto write = [&](int begin) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp * 16 + lane / 4 + half * 8;
        const auto offsets = rows.offsets[row];
        const bool exists = tables.exists[row];
        const float sum = softmax.sum(half), normalizer = softmax.normalizer(sum);
        const float d_lse = normalizer * sum_of_row(d_sum[half]);
#pragma unroll
        for (int d = 0; d < kPart / 8; ++d)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            output_rmem[d][i] *= normalizer;
            d_output_rmem[d][i] = d_output_rmem[d][i] * normalizer - d_lse * output_rmem[d][i];
          }
        store_row<kPart>(output_rmem, half, 1.0f, exists && rows.output.data, lane,
                         offset_by(in_batch(rows.output, stage.batch) + begin, offsets.output));
        store_row<kPart>(d_output_rmem, half, 1.0f, exists && rows.d_output.data, lane,
                         offset_by(in_batch(rows.d_output, stage.batch) + begin, offsets.output));
        if (begin > 0 || lane % 4 > 0 || !exists) continue;
        if (rows.lse.data)
          *offset_by(in_batch(rows.lse, stage.batch), offsets.lse) = softmax.lse(half, sum);
        if (rows.d_lse.data) *offset_by(in_batch(rows.d_lse, stage.batch), offsets.lse) = d_lse;
      }
#pragma unroll
      for (int d = 0; d < kPart / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) output_rmem[d][i] = d_output_rmem[d][i] = 0;
    };

    // O += P V,  dO += P dS V + P dV, kPart dimensions of them at a time
    unsigned weight_rmem[kColumnTiles / 2][4];    // P [16, kColumns]
    unsigned d_weight_rmem[kColumnTiles / 2][4];  // P dS [16, kColumns]
#pragma unroll
    for (int begin = 0; begin < Plan::kValueDim; begin += kPart) {
      if (begin > 0) write(begin - kPart);
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        unsigned (&weights)[4] = weight_rmem[n / 2], (&d_weights)[4] = d_weight_rmem[n / 2];
        if (begin == 0)
          exponentiate(softmax, &logit_rmem[n], &d_logit_rmem[n], problem.scale, weights, d_weights,
                       d_sum);
#pragma unroll
        for (int d = 0; d < kPart; d += 16) {
          unsigned value_rmem[4], d_value_rmem[4];  // V[8 * n : 8 * n + 16, begin + d :] and dV
          const unsigned values = chunk_address(tile.nn(n * 8), (Plan::kHeadDim + begin + d) / 8);
          ldmatrix_x4_trans(value_rmem, values);
          ldmatrix_x4_trans(d_value_rmem, values + to_tangents);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const unsigned low = value_rmem[2 * i], high = value_rmem[2 * i + 1];
            float (&output)[4] = output_rmem[d / 8 + i], (&d_output)[4] = d_output_rmem[d / 8 + i];
            mma_m16n8k16(output, weights, low, high, Element());
            mma_m16n8k16(d_output, d_weights, low, high, Element());
            mma_m16n8k16(d_output, weights, d_value_rmem[2 * i], d_value_rmem[2 * i + 1],
                         Element());
          }
        }
      }
    }

    StageOf next = stage;
    more = advance<Plan>(problem, tables, next);
    __syncthreads();  // everyone is done with this stage, whose memory the next takes
    if (more) load(next);
    write(Plan::kValueDim - kPart);
    stage = next;
  }
}

}  // namespace cuneigh::fused::small
