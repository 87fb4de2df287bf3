// The gradients of neighborhood attention of small windows on tensor cores, the logits recomputed:
// the products of fused/backward.cu on the stages and tiles of fused/small/forward.cu. With
// P = exp(scale * S - lse) and dS = P * (dP - delta):
//
//   S = row_qk column_qk^T   dP = row_vo column_vo^T
//   grad_qk = scale * dS column_qk                      dQ or dK
//   grad_v = P column_vo                                dV, if rows are keys
//
// Sixteen columns are done at a time, since no maximum has to be known first. The kernel for
// queries computes their statistics on the way (sums/delta.cu says what they are) and leaves them
// for the kernel for keys.
//
// blockIdx.x: (which elements of the batch, head, box of rows). The plan is that of
// fused/small/forward.cu, with one buffer; kOneStage and kLse are false.

#include "cuneigh/softmax.cuh"
#include "fused/small/boxes.cuh"
#include "fused/small/gradients.cuh"
#include "fused/small/hidden.cuh"
#include "fused/small/tiles.cuh"
#include "fused/small/warp_rows.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct BackwardArguments : KeyMask<Plan> {
  using Vectors = View<const typename Plan::Element, Plan::kRank>;
  Vectors row_qk, row_vo;                // query and grad_output, or key and value
  Vectors column_qk, column_vo;          // key and value, or query and grad_output
  View<float2, Plan::kRank> statistics;  // of queries: written if they are rows, else read
  View<typename Plan::Element, Plan::kRank> grad_qk, grad_v;  // of the rows; queries have no grad_v
  Vectors output;                                             // if rows are queries
  View<const float, Plan::kRank> lse, grad_lse;               // likewise; grad_lse may be null
};

// Where a row lies in global memory: its offset from the origin of each array.
template <bool kRowsAreKeys>
struct RowOffsets {
  unsigned qk, vo, grad_qk, grad_v;
};
template <>
struct RowOffsets<false> {
  unsigned qk, vo, grad_qk, output, statistics, lse, grad_lse;
};

// Where the rows of a block lie: the origin of each array, and the offsets of each row.
template <typename Plan>
struct Rows : RowMask<Plan> {
  using Offsets = RowOffsets<Plan::kRowsAreKeys>;

  Origin<const typename Plan::Element> qk, vo, output;
  Origin<typename Plan::Element> grad_qk, grad_v;
  Origin<float2> statistics;
  Origin<const float> lse, grad_lse;
  Offsets offsets[SmallTables<Plan>::kRows];
};

// sum(grad_output * output) of rows lane / 4 and lane / 4 + 8: the diagonal of dO O^T [16, 16],
// with the arguments of gemm_nt_16.
template <typename Plan, typename RowOperand, typename Address>
__device__ float2 delta_of_rows(RowOperand grad_output, Address output_address, int lane) {
  float product[2][4];
  gemm_nt_16<Plan::kValueDim>(grad_output, output_address, product, typename Plan::Element());
  const int row = lane / 4, holder = row * 4 + row / 2;
  const bool odd = row % 2;
  return {__shfl_sync(0xffffffffu, odd ? product[0][1] : product[0][0], holder),
          __shfl_sync(0xffffffffu, odd ? product[1][3] : product[1][2], holder)};
}

// Dimensions of K and V that a thread has room for beside the gradients of both.
#if __CUDA_ARCH__ >= 1000
constexpr int kRoomForKeys = 128;
#else
constexpr int kRoomForKeys = 176;
#endif

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    backward(const SmallWindowProblem<Plan::kRank> problem, const BackwardArguments<Plan> arguments
#ifdef CUNEIGH_TMA
             ,
             const __grid_constant__ TensorMap column_qk_map,
             const __grid_constant__ TensorMap column_vo_map,
             const __grid_constant__ TensorMap row_qk_map,
             const __grid_constant__ TensorMap row_vo_map,
             const __grid_constant__ TensorMap output_map  // that of row_vo if rows are keys
#endif
    ) {
  using Element = typename Plan::Element;
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  static_assert(
      sizeof(BackwardArguments<Plan>) == (10 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`backward` in cuneigh/_backends/fused/launch.py packs these views");
  // Dimensions of the rows that are kept in registers; the others are read again for every sixteen
  // columns. Where vectors are long, the loop stays one: unrolled, it would need more registers
  constexpr bool kLong = kHeadDim + kValueDim > 128;
  constexpr int kRoom = !Plan::kRowsAreKeys ? 256 : Plan::kBlocks > 2 ? 96 : kRoomForKeys;
  constexpr int kKept = kHeadDim + kValueDim < kRoom ? kHeadDim + kValueDim : kRoom;
  extern __shared__ __align__(128) char memory_smem[];
  // Of the rows: Q, dO and O, or K and V
  constexpr int kRowDim = kHeadDim + kValueDim + (Plan::kRowsAreKeys ? 0 : kValueDim);
  auto& smem = *reinterpret_cast<SmallSmem<Plan, kRowDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ Rows<Plan> rows;
  __shared__ Barrier full;  // of what TMA brings
  using Offsets = typename Rows<Plan>::Offsets;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kByTma && threadIdx.x == 0) {
    full.init(1 + Plan::kWarps);
    fence_barrier_init();
  }
  fill_row_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    Offsets& offsets = rows.offsets[row];
    offsets.qk = offset_of(arguments.row_qk, token);
    offsets.vo = offset_of(arguments.row_vo, token);
    offsets.grad_qk = offset_of(arguments.grad_qk, token);
    if constexpr (Plan::kRowsAreKeys) {
      offsets.grad_v = offset_of(arguments.grad_v, token);
    } else {
      offsets.output = offset_of(arguments.output, token);
      offsets.statistics = offset_of(arguments.statistics, token);
      offsets.lse = offset_of(arguments.lse, token);
      offsets.grad_lse = offset_of(arguments.grad_lse, token);
    }
    rows.fill(arguments, row, token);
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.qk = origin_of_rows(arguments.row_qk, head);
    rows.vo = origin_of_rows(arguments.row_vo, head);
    rows.grad_qk = origin_of_rows(arguments.grad_qk, head);
    rows.grad_v = origin_of_rows(arguments.grad_v, head);
    rows.output = origin_of_rows(arguments.output, head);
    rows.statistics = origin_of_rows(arguments.statistics, head);
    rows.lse = origin_of_rows(arguments.lse, head);
    rows.grad_lse = origin_of_rows(arguments.grad_lse, head);
    rows.begin(arguments, head);
  }
  if constexpr (kMaskedColumns<Plan>)
    fill_column_tables<Plan>(problem, arguments.column_qk, arguments.column_vo, arguments.key_mask,
                             smem);
  else
    fill_column_tables<Plan>(problem, arguments.column_qk, arguments.column_vo,
                             arguments.statistics, smem);
  SeenColumns<Plan> seen;
  seen.begin(problem, arguments, smem);
  fill_tiles<Plan>(problem, warp, lane, smem);
  __syncthreads();

  auto* rows_smem = &smem.row[0][warp * 16];  // [16, kRowDim]
  // The left operand of dimensions d to d + 15 of the rows
  const auto row_operand = [&](int d, unsigned (&operand)[4]) {
    if constexpr (kByTma)
      ldmatrix_x4(operand, left_operand_address<kHeadDim>(smem.row_address(d / kHeadDim, warp),
                                                          d % kHeadDim, lane));
    else
      load_row_operand(rows_smem, d, lane, operand);
  };
  auto load = [&](const StageOf& stage) {
#ifdef CUNEIGH_TMA
    if (threadIdx.x == 0)
      load_stage_box<Plan>(problem, stage, column_qk_map, column_vo_map, full, smem, 0);
    if (lane == 0) {
      if constexpr (Plan::kRowsAreKeys)
        load_row_boxes<Plan>(problem, stage, warp, {&row_qk_map, &row_vo_map}, full, smem);
      else
        load_row_boxes<Plan>(problem, stage, warp, {&row_qk_map, &row_vo_map, &output_map}, full,
                             smem);
    }
#else
    load_stage(problem, stage, tables.qk, tables.vo, smem, 0, threadIdx.x);
#endif
    if constexpr (Plan::kRowsAreKeys) {
      const float2* source = first_column_of(problem, tables.extra, stage, tables);
      for (int i = threadIdx.x; i < tables.stage_columns; i += Plan::kWarps * 32) {
        copy_8_bytes(&smem.statistics()[i], offset_by(source, smem.extra_offset(i)), true);
      }
    }
    if (!kByTma && stage.is_first()) {
      const Offsets* offsets = &rows.offsets[warp * 16];
      load_warp_rows<kHeadDim, &Offsets::qk>(in_batch(rows.qk, stage.batch), offsets, lane,
                                             rows_smem, 0);
      load_warp_rows<kValueDim, &Offsets::vo>(in_batch(rows.vo, stage.batch), offsets, lane,
                                              rows_smem, kHeadDim);
      if constexpr (!Plan::kRowsAreKeys)
        load_warp_rows<kValueDim, &Offsets::output>(in_batch(rows.output, stage.batch), offsets,
                                                    lane, rows_smem, kHeadDim + kValueDim);
    }
    cp_async_commit();
  };
  const float scale = in_register(problem.scale);
  StageOf stage = {tables.rows.batch * problem.batch_heads, 0, 0};
  load(stage);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8
  const int first_row = warp * 16 + lane / 4;
  float grad_qk[kHeadDim / 8][4] = {};  // [16, kHeadDim]
  float grad_v[kValueDim / 8][4] = {};  // [16, kValueDim]

  PairStatistics of_rows;  // if they are queries
  while (true) {
    const bool is_first = stage.is_first();
    if constexpr (!Plan::kRowsAreKeys) {
      if (is_first) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Offsets& offsets = rows.offsets[first_row + half * 8];
          const float lse = *offset_by(in_batch(rows.lse, stage.batch), offsets.lse);
          const float grad_lse =
              rows.grad_lse.data == nullptr
                  ? 0.0f
                  : *offset_by(in_batch(rows.grad_lse, stage.batch), offsets.grad_lse);
          of_rows.of[half] = {kLog2E * finite_lse(lse), -grad_lse};
        }
      }
    }
    seen.look(problem, stage, smem);
    if (is_first) rows.look(stage.batch);
    cp_async_wait<0>();
    if (kByTma) full.wait(stages_before(problem, stage, tables) % 2);
    const Hidden hidden = seen.wait(problem, arguments, stage, smem, 0, kQk);
    if constexpr (!Plan::kRowsAreKeys) {
      if (is_first) {
        // delta = sum(dO * O) - grad_lse
        const auto grad_output = [&](int d, unsigned (&operand)[4]) {
          row_operand(kHeadDim + d, operand);
        };
        const auto output_address = [&](int d) {
          if (kByTma) return right_operand_address<kValueDim>(smem.row_address(2, warp), d, lane);
          return address_of(rows_smem, 0, lane / 16 * 8 + lane % 8, kHeadDim + kValueDim + d,
                            lane / 8 % 2 * 8);
        };
        const float2 delta = delta_of_rows<Plan>(grad_output, output_address, lane);
        of_rows.of[0].y += delta.x;
        of_rows.of[1].y += delta.y;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + half * 8;
          if (lane % 4 == 0 && tables.exists[row])
            *offset_by(in_batch(rows.statistics, stage.batch), rows.offsets[row].statistics) =
                of_rows.of[half];
        }
      }
    }

    const unsigned first = smem.tile(stage.index, warp);
    LaneMasks<Plan> masks;
    bool meet = first != kNoTile && hidden != kEveryColumn && rows.any_is_seen();
    if (meet) {
      masks = smem.visible(stage.index, warp, lane);
      if (hidden) {
        masks &= seen.of_tile(smem, first);
        meet = __any_sync(0xffffffffu, masks.row[0] | masks.row[1]);
      }
    }
    if (meet) {
      const auto& visible = masks.row;
      unsigned row_rmem[kKept / 16][4];  // [16, kKept]
#pragma unroll
      for (int d = 0; d < kKept; d += 16) row_operand(d, row_rmem[d / 16]);
      const auto row_qk = [&](int d, unsigned (&operand)[4]) {
        if (d >= kKept) return row_operand(d, operand);
#pragma unroll
        for (int i = 0; i < 4; ++i) operand[i] = row_rmem[d / 16][i];
      };
      const auto row_vo = [&](int d, unsigned (&operand)[4]) { row_qk(kHeadDim + d, operand); };
      const float2* of_first =  // statistics of the tile's first column
          smem.statistics() + (kByTma ? first : first / kColumnBytes<Plan>);
      const TileAddresses<Plan> tile(smem.stage_address(0), first, tables.tile_offset, lane);
#pragma unroll(kLong ? 1 : Plan::kColumns / 16)
      for (int n = 0; n < Plan::kColumns; n += 16) {
        // Near a border keys are seen by more queries than elsewhere, where tiles are not full
        const unsigned any = (visible[0] | visible[1]) >> (n / 4) & 0xf;
        if (Plan::kRowsAreKeys && !__any_sync(0xffffffffu, any)) continue;

        const auto statistics_of = [&](int n) {
          if constexpr (!Plan::kRowsAreKeys) return of_rows;
          const uint2 offset = tile.pair(n);
          const float2 low = of_first[offset.x / kColumnBytes<Plan>];
          const float2 high = of_first[offset.y / kColumnBytes<Plan>];
          return PairStatistics{{low, high}};
        };
        add_columns(problem, tile, n, row_qk, row_vo, scale, masks, n / 4, statistics_of, grad_qk,
                    grad_v);
      }
    }

    StageOf next = stage;
    const bool more = advance<Plan>(problem, tables, next);
    __syncthreads();
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
      store_row<kHeadDim>(grad_qk, half, problem.gradient_scale, tables.exists[row], lane,
                          offset_by(in_batch(rows.grad_qk, batch), offsets.grad_qk), is_hidden);
      if constexpr (Plan::kRowsAreKeys)
        store_row<kValueDim>(grad_v, half, 1.0f, tables.exists[row], lane,
                             offset_by(in_batch(rows.grad_v, batch), offsets.grad_v), is_hidden);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) grad_qk[d][i] = 0;
#pragma unroll
      for (int d = 0; d < kValueDim / 8; ++d) grad_v[d][i] = 0;
    }
    if (!more) break;
  }
}

}  // namespace cuneigh::fused::small
