// How the gradients of neighborhood attention of small windows change along tangents, which have a
// prime here, on tensor cores: the formulas of fused/hvp.cu, whose words these are, on the stages
// and tiles of fused/small/forward.cu, sixteen columns at a time.
//
//   P = exp(S - lse)     P' = P (S' - lse')
//   dS = P (dP - delta)  dS' = P' (dP - delta) + P (dP' - delta')
//
// The kernel for queries finds lse', delta and delta' on the way, with T for S':
//
//   lse' = sum(P T)   delta + grad_lse = sum(P dP)
//   delta' + grad_lse' = sum(P' dP + P dP') = sum(P T dP) + sum(P dP') - lse' sum(P dP)
//
// It goes over its columns twice: for these sums, and then for the gradient. All that it knows of a
// small tile stays in registers meanwhile; of a larger one it is computed again. It leaves the sums
// for the kernel for keys.
//
// Of the two buffers for stages and rows in shared memory the first is for the arrays and the
// second for their tangents, which lie in global memory alike. The rows are kept in registers.
//
// blockIdx.x: (which elements of the batch, head, box of rows). The plan is that of
// fused/small/forward.cu, with two kBuffers; kLse is false, and kOneStage is what kRowsAreKeys is
// not. Beside it:
//
//   static constexpr bool kGradMoves;  whether there is a dO', which else is 0

#include "cuneigh/softmax.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "fused/small/hidden.cuh"
#include "fused/small/products.cuh"
#include "fused/small/tiles.cuh"
#include "fused/small/warp_rows.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct HvpArguments : KeyMask<Plan> {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  using Numbers = View<const float, Plan::kRank>;
  // The arrays, or their tangents
  struct Arrays {
    Vectors row_qk, row_vo;                // query and grad_output, or key and value
    Vectors column_qk, column_vo;          // key and value, or query and grad_output
    View<float2, Plan::kRank> statistics;  // {lse * log2(e), delta}, or {lse', delta'}, of queries:
                                           // written if they are rows, else read
  };
  Arrays arrays, tangents;
  View<typename Plan::Element, Plan::kRank> d_grad_qk, d_grad_v;  // of the rows
  // If rows are queries; the gradients may be null
  View<float, Plan::kRank> d_lse;
  Numbers lse, grad_lse, d_grad_lse;
};

// Where a row lies in global memory: its offset from the origin of each array.
template <bool kRowsAreKeys>
struct MovingRowOffsets {
  unsigned qk, vo, grad_qk, grad_v;
};
template <>
struct MovingRowOffsets<false> {
  unsigned qk, vo, grad_qk, statistics, d_lse, lse, grad_lse, d_grad_lse;
};

// Where the rows of a block lie, and the tangents of its columns.
template <typename Plan>
struct HvpRows : RowMask<Plan> {
  using Offsets = MovingRowOffsets<Plan::kRowsAreKeys>;
  using Vectors = Origin<const typename Plan::Element>;

  Vectors qk, vo, d_qk, d_vo, d_column_qk, d_column_vo;
  Origin<typename Plan::Element> grad_qk, grad_v;
  Origin<float2> statistics, d_statistics;
  Origin<float> d_lse;
  Origin<const float> lse, grad_lse, d_grad_lse;
  Offsets offsets[SmallTables<Plan>::kRows];
};

// A number of one of a lane's rows, 0 if there is no array of it.
__device__ inline float number_of(const Origin<const float>& origin, int batch, unsigned offset) {
  return origin.data == nullptr ? 0.0f : *offset_by(in_batch(origin, batch), offset);
}

// Columns of a tile for which registers have room beside all else that the kernel for queries
// needs.
constexpr int kMostKept = 80;

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    hvp(const SmallWindowProblem<Plan::kRank> problem, const HvpArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  constexpr bool kRowsAreKeys = Plan::kRowsAreKeys;
  constexpr bool kRowVoMoves = kRowsAreKeys || Plan::kGradMoves;
  constexpr bool kColumnVoMoves = !kRowsAreKeys || Plan::kGradMoves;
  static_assert(
      sizeof(HvpArguments<Plan>) == (16 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`hvp` in cuneigh/_backends/fused/tangents.py packs these views");
  static_assert(Plan::kOneStage == !kRowsAreKeys && Plan::kBuffers == 2);
  extern __shared__ __align__(128) char memory_smem[];
  constexpr int kRowDim = kHeadDim + kValueDim;
  auto& smem = *reinterpret_cast<SmallSmem<Plan, kRowDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ HvpRows<Plan> rows;
  using Offsets = typename HvpRows<Plan>::Offsets;
  const auto &arrays = arguments.arrays, &tangents = arguments.tangents;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_row_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    Offsets& offsets = rows.offsets[row];
    offsets.qk = offset_of(arrays.row_qk, token);
    offsets.vo = offset_of(arrays.row_vo, token);
    offsets.grad_qk = offset_of(arguments.d_grad_qk, token);
    if constexpr (kRowsAreKeys) {
      offsets.grad_v = offset_of(arguments.d_grad_v, token);
    } else {
      offsets.statistics = offset_of(arrays.statistics, token);
      offsets.d_lse = offset_of(arguments.d_lse, token);
      offsets.lse = offset_of(arguments.lse, token);
      offsets.grad_lse = offset_of(arguments.grad_lse, token);
      offsets.d_grad_lse = offset_of(arguments.d_grad_lse, token);
    }
    rows.fill(arguments, row, token);
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.qk = origin_of_rows(arrays.row_qk, head);
    rows.vo = origin_of_rows(arrays.row_vo, head);
    rows.d_qk = origin_of_rows(tangents.row_qk, head);
    rows.d_vo = origin_of_rows(tangents.row_vo, head);
    rows.d_column_qk = origin_of_columns<Plan>(problem, tangents.column_qk, tables);
    rows.d_column_vo = origin_of_columns<Plan>(problem, tangents.column_vo, tables);
    rows.grad_qk = origin_of_rows(arguments.d_grad_qk, head);
    rows.grad_v = origin_of_rows(arguments.d_grad_v, head);
    if constexpr (kRowsAreKeys) {
      rows.d_statistics = origin_of_columns<Plan>(problem, tangents.statistics, tables);
    } else {
      rows.statistics = origin_of_rows(arrays.statistics, head);
      rows.d_statistics = origin_of_rows(tangents.statistics, head);
    }
    rows.d_lse = origin_of_rows(arguments.d_lse, head);
    rows.lse = origin_of_rows(arguments.lse, head);
    rows.grad_lse = origin_of_rows(arguments.grad_lse, head);
    rows.d_grad_lse = origin_of_rows(arguments.d_grad_lse, head);
    rows.begin(arguments, head);
  }
  if constexpr (kMaskedColumns<Plan>)
    fill_column_tables<Plan>(problem, arrays.column_qk, arrays.column_vo, arguments.key_mask, smem);
  else
    fill_column_tables<Plan>(problem, arrays.column_qk, arrays.column_vo, arrays.statistics, smem);
  fill_tiles<Plan>(problem, warp, lane, smem);
  __syncthreads();

  SeenColumns<Plan> seen;
  auto load = [&](const StageOf& stage) {
    const int thread = forgotten(threadIdx.x);
    load_stage(problem, stage, tables.qk, tables.vo, smem, 0, thread);
    load_stage<Plan, kColumnVoMoves>(problem, stage, rows.d_column_qk, rows.d_column_vo, smem, 1,
                                     thread);
    if constexpr (kRowsAreKeys) {
      const float2* source = first_column_of(problem, tables.extra, stage, tables);
      const float2* d_source = first_column_of(problem, rows.d_statistics, stage, tables);
      float2* target = smem.statistics();
      for (int i = thread; i < tables.stage_columns; i += Plan::kWarps * 32) {
        const unsigned offset = smem.extra_offset(i);
        copy_8_bytes(&target[i], offset_by(source, offset), true);
        copy_8_bytes(&target[tables.stage_columns + i], offset_by(d_source, offset), true);
      }
    }
    cp_async_commit();
  };
  // A warp loads its own rows, before the first stage of each element of the batch
  auto load_rows = [&](const StageOf& stage) {
    if (!stage.is_first()) return;
    const int thread = forgotten(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const Offsets* offsets = &rows.offsets[warp * 16];
    const auto load = [&](const auto& qk, const auto& vo, bool vo_moves, int buffer) {
      auto* target = &smem.row[buffer][warp * 16];
      load_warp_rows<kHeadDim, &Offsets::qk>(in_batch(qk, stage.batch), offsets, lane, target, 0);
      if (vo_moves)
        load_warp_rows<kValueDim, &Offsets::vo>(in_batch(vo, stage.batch), offsets, lane, target,
                                                kHeadDim);
    };
    load(rows.qk, rows.vo, true, 0);
    load(rows.d_qk, rows.d_vo, kRowVoMoves, 1);
  };
  const float scale = in_register(problem.scale);
  const float d_scale = scale * kLn2;  // from base 2 to the natural one
  StageOf stage = {tables.rows.batch * problem.batch_heads, 0, 0};
  load_rows(stage);
  load(stage);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8
  float d_grad_qk[kHeadDim / 8][4];  // [16, kHeadDim]
  float d_grad_v[kValueDim / 8][4];  // [16, kValueDim]
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) d_grad_qk[d][i] = 0;
#pragma unroll
      for (int d = 0; d < kValueDim / 8; ++d) d_grad_v[d][i] = 0;
    }
  };
  if (kRowsAreKeys) clear();
  unsigned row_rmem[2][kRowDim / 16][4];  // the rows and their tangents [16, kRowDim]
  while (true) {
    const int thread = forgotten(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int first_row = warp * 16 + lane / 4;
    StageOf next = stage;
    const bool more = advance<Plan>(problem, tables, next);
    seen.look(problem, stage, smem);
    if (stage.is_first()) rows.look(stage.batch);
    float lse[2], grad_lse[2], d_grad_lse[2];
    if constexpr (!kRowsAreKeys) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Offsets& offsets = rows.offsets[first_row + half * 8];
        lse[half] = number_of(rows.lse, stage.batch, offsets.lse);
        grad_lse[half] = number_of(rows.grad_lse, stage.batch, offsets.grad_lse);
        d_grad_lse[half] = number_of(rows.d_grad_lse, stage.batch, offsets.d_grad_lse);
      }
    }
    cp_async_wait<0>();
    const Hidden hidden = seen.wait(problem, arguments, stage, smem, 0, kBoth, 2);

    // Registers take the rows, whose memory then takes the next
    if (stage.is_first()) {
#pragma unroll
      for (int buffer = 0; buffer < 2; ++buffer)
#pragma unroll
        for (int d = 0; d < (buffer == 0 || kRowVoMoves ? kRowDim : kHeadDim); d += 16)
          load_row_operand(&smem.row[buffer][warp * 16], d, lane, row_rmem[buffer][d / 16]);
      __syncwarp();
    }
    if (more) load_rows(next);

    const unsigned first = smem.tile(stage.index, warp);
    LaneMasks<Plan> masks;
    bool meet = (Plan::kOneStage || first != kNoTile) && rows.any_is_seen();
    if (meet) {
      masks = smem.visible(stage.index, warp, lane);
      if (hidden) masks &= seen.of_tile(smem, first);
    }
    if (meet) {
      const auto& visible = masks.row;
      const auto sees = [&](int n, int t, int i) -> bool {
        return visible[i / 2] >> (n / 4 + t * 2 + i % 2) & 1;
      };
      // Left operands: vectors of the rows, from the dimension `begin` on
      const auto operands = [&](int buffer, int begin) {
        return [&, buffer, begin](int d, unsigned (&operand)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) operand[i] = row_rmem[buffer][(begin + d) / 16][i];
        };
      };
      const auto row_qk = operands(0, 0), row_vo = operands(0, kHeadDim);
      const auto d_row_qk = operands(1, 0), d_row_vo = operands(1, kHeadDim);
      const unsigned to_tangents = tables.stage_bytes;  // from a column to its tangent
      const auto addresses = [&](int thread) -> TileAddresses<Plan> {
        return {smem.stage_address(0), first, tables.tile_offset, thread % 32};
      };
      const TileAddresses<Plan> tile = addresses(thread);
      // Of sixteen columns: S and S', dP and dP'
      const auto logits_of = [&](const TileAddresses<Plan>& tile, int n, float (&logit)[2][4],
                                 float (&d_logit)[2][4]) {
        const unsigned columns = tile.nt(n);
        const auto address = [&](int d) { return chunk_address(columns, d / 8); };
        moving_gemm_nt_16<kHeadDim, true, true>(row_qk, d_row_qk, address, to_tangents, logit,
                                                d_logit, Element());
      };
      const auto grad_weights_of = [&](const TileAddresses<Plan>& tile, int n, float (&grad)[2][4],
                                       float (&d_grad)[2][4]) {
        const unsigned columns = tile.nt(n);
        const auto address = [&](int d) { return chunk_address(columns, (kHeadDim + d) / 8); };
        moving_gemm_nt_16<kValueDim, kRowVoMoves, kColumnVoMoves>(
            row_vo, d_row_vo, address, to_tangents, grad, d_grad, Element());
      };
      // d_grad_qk += dS' column_qk + dS column_qk'
      const auto add_to_qk = [&](const TileAddresses<Plan>& tile, int n,
                                 const float (&grad_logit)[2][4],
                                 const float (&d_grad_logit)[2][4]) {
        const unsigned columns = tile.nn(n);
        const auto address = [&](int d) { return chunk_address(columns, d / 8); };
        const auto d_address = [&](int d) { return address(d) + to_tangents; };
        gemm_nn_16<kHeadDim>(d_grad_logit, address, d_grad_qk, Element());
        gemm_nn_16<kHeadDim>(grad_logit, d_address, d_grad_qk, Element());
      };

      if constexpr (kRowsAreKeys) {
        const float2* of_first = smem.statistics() + first / kColumnBytes<Plan>;
        const float2* d_of_first = of_first + tables.stage_columns;
#pragma unroll
        for (int n = 0; n < Plan::kColumns; n += 16) {
          // Near a border keys are seen by more queries than elsewhere, where tiles are not full
          const unsigned any = (visible[0] | visible[1]) >> (n / 4) & 0xf;
          if (!__any_sync(0xffffffffu, any)) continue;
          float weight[2][4], d_weight[2][4], grad[2][4], d_grad[2][4];
          logits_of(tile, n, weight, d_weight);
          grad_weights_of(tile, n, grad, d_grad);
          // What is hidden stays 0 whatever it is multiplied with
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            const uint2 offset = tile.pair(n + t * 8);
            const unsigned column[2] = {offset.x / kColumnBytes<Plan>,
                                        offset.y / kColumnBytes<Plan>};
            const float2 statistics[2] = {of_first[column[0]], of_first[column[1]]};
            const float2 moved[2] = {d_of_first[column[0]], d_of_first[column[1]]};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const auto [lse, delta] = statistics[i % 2];
              const auto [d_lse, d_delta] = moved[i % 2];
              const float p = sees(n, t, i) ? ex2_approx(fmaf(weight[t][i], scale, -lse)) : 0.0f;
              const float d_p = p == 0 ? 0.0f : p * fmaf(d_weight[t][i], d_scale, -d_lse);
              const float of_weight = grad[t][i] - delta;
              const float d_of_weight = d_grad[t][i] - d_delta;
              weight[t][i] = p;
              d_weight[t][i] = d_p;
              grad[t][i] = p == 0 ? 0.0f : p * of_weight;
              d_grad[t][i] = p == 0 ? 0.0f : fmaf(d_p, of_weight, p * d_of_weight);
            }
          }
          // d_grad_v += P' column_vo + P column_vo'
          const unsigned columns = tile.nn(n);
          const auto address = [&](int d) { return chunk_address(columns, (kHeadDim + d) / 8); };
          const auto d_address = [&](int d) { return address(d) + to_tangents; };
          gemm_nn_16<kValueDim>(d_weight, address, d_grad_v, Element());
          if constexpr (kColumnVoMoves)
            gemm_nn_16<kValueDim>(weight, d_address, d_grad_v, Element());
          add_to_qk(tile, n, grad, d_grad);
        }
      } else {
        constexpr int kParts = Plan::kColumns / 16;
        // P and T, dP and dP' [16, kColumns] of small tiles, of others those of sixteen columns
        constexpr bool kKeeps = Plan::kColumns <= kMostKept;
        float weights[kKeeps ? kParts : 1][2][4], d_logits[kKeeps ? kParts : 1][2][4];
        float grads[kKeeps ? kParts : 1][2][4], d_grads[kKeeps ? kParts : 1][2][4];
        float d_lse[2] = {}, delta[2] = {}, moved[2] = {}, turned[2] = {};
#pragma unroll
        for (float& each : lse) each = kLog2E * finite_lse(each);
        const auto weights_of = [&](const TileAddresses<Plan>& tile, int n, float (&weight)[2][4],
                                    float (&d_logit)[2][4]) {
          logits_of(tile, n, weight, d_logit);
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float logit = fmaf(weight[t][i], scale, -lse[i / 2]);
              const float p = sees(n, t, i) ? ex2_approx(logit) : 0.0f;
              weight[t][i] = p;
              d_logit[t][i] = p == 0 ? 0.0f : d_logit[t][i] * d_scale;
            }
        };
#pragma unroll(kKeeps ? kParts : 1)
        for (int part = 0; part < kParts; ++part) {
          float (&weight)[2][4] = weights[kKeeps ? part : 0];
          float (&d_logit)[2][4] = d_logits[kKeeps ? part : 0];
          float (&grad)[2][4] = grads[kKeeps ? part : 0];
          float (&d_grad)[2][4] = d_grads[kKeeps ? part : 0];
          weights_of(tile, part * 16, weight, d_logit);
          grad_weights_of(tile, part * 16, grad, d_grad);
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float p = weight[t][i], of_logit = p == 0 ? 0.0f : p * grad[t][i];
              d_lse[i / 2] += p * d_logit[t][i];
              delta[i / 2] += of_logit;
              moved[i / 2] += of_logit * d_logit[t][i];
              turned[i / 2] += p == 0 ? 0.0f : p * d_grad[t][i];
            }
        }
        float d_delta[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Offsets& offsets = rows.offsets[first_row + half * 8];
          d_lse[half] = sum_of_row(d_lse[half]);
          delta[half] = sum_of_row(delta[half]);
          d_delta[half] =
              sum_of_row(moved[half] + turned[half]) - d_lse[half] * delta[half] - d_grad_lse[half];
          delta[half] -= grad_lse[half];
          if (lane % 4 > 0 || !tables.exists[first_row + half * 8]) continue;
          const auto at = [&](const auto& origin, unsigned offset) {
            return offset_by(in_batch(origin, stage.batch), offset);
          };
          *at(rows.statistics, offsets.statistics) = {lse[half], delta[half]};
          *at(rows.d_statistics, offsets.statistics) = {d_lse[half], d_delta[half]};
          *at(rows.d_lse, offsets.d_lse) = d_lse[half];
        }
        const TileAddresses<Plan> again = addresses(forgotten(thread));  // those are not kept
        clear();
#pragma unroll(kKeeps ? kParts : 1)
        for (int part = 0; part < kParts; ++part) {
          float (&weight)[2][4] = weights[kKeeps ? part : 0];
          float (&d_logit)[2][4] = d_logits[kKeeps ? part : 0];
          float (&grad)[2][4] = grads[kKeeps ? part : 0];
          float (&d_grad)[2][4] = d_grads[kKeeps ? part : 0];
          if (!kKeeps) weights_of(again, part * 16, weight, d_logit);
          if (!kKeeps) grad_weights_of(again, part * 16, grad, d_grad);
#pragma unroll
          for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float p = weight[t][i], d_p = p * (d_logit[t][i] - d_lse[i / 2]);
              const float of_weight = grad[t][i] - delta[i / 2];
              const float d_of_weight = d_grad[t][i] - d_delta[i / 2];
              grad[t][i] = p == 0 ? 0.0f : p * of_weight;
              d_grad[t][i] = p == 0 ? 0.0f : fmaf(d_p, of_weight, p * d_of_weight);
            }
          add_to_qk(again, part * 16, grad, d_grad);
        }
      }
    }

    __syncthreads();  // everyone is done with this stage, whose memory the next takes
    if (more) load(next);
    const int batch = stage.batch;
    stage = next;
    if (more && !next.is_first()) continue;

    // After the last stage of a batch-head
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      const auto offsets = rows.offsets[row];
      const bool is_hidden = rows.hides(half);
      store_row<kHeadDim>(d_grad_qk, half, problem.gradient_scale, tables.exists[row], lane,
                          offset_by(in_batch(rows.grad_qk, batch), offsets.grad_qk), is_hidden);
      if constexpr (kRowsAreKeys)
        store_row<kValueDim>(d_grad_v, half, 1.0f, tables.exists[row], lane,
                             offset_by(in_batch(rows.grad_v, batch), offsets.grad_v), is_hidden);
    }
    if (!more) break;
    if (kRowsAreKeys) clear();
  }
}

}  // namespace cuneigh::fused::small
