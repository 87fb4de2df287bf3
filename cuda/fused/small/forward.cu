// Neighborhood attention of small windows on tensor cores: the window union of a block's queries
// lies in shared memory at once, and each warp multiplies its sixteen queries with just the keys
// that they see, mostly in one pass. For each query:
//
//   S = scale * Q K^T, over the keys of its window
//   O = softmax(S) V,   lse = log(sum(exp(S)))
//
// fused/small/problem.cuh defines the words: stage, tile and unit.
//
// blockIdx.x: (which elements of the batch, head, box of queries).
//
// struct Plan {
//   static constexpr int kRank;               token axes
//   static constexpr int kWarps;              warps of a block; each takes up to 16 queries
//   static constexpr int kBlocks;             blocks of a multiprocessor to leave registers for
//   static constexpr int kColumns;            slots of a tile, up to 256
//   static constexpr bool kOneStage;          one stage holds the window union of a block
//   static constexpr bool kLse;               lse is wanted
//   static constexpr int kBuffers;            stages in shared memory: 1, or 2 by turns
//   static constexpr int kHeadDim, kValueDim; head dimensions: 32, 64 or 128
//   static constexpr int kTileExtents;        length of SmallTables::prefix_mask
//   static constexpr int kTableBytes;         of SmallTables, as the launcher counts them
//   static constexpr bool kRowsAreKeys;       false
//   static constexpr bool kKeyMask;           there is a key mask
//   using Element;                            float16 or bfloat16
// };

#include "fused/small/boxes.cuh"
#include "fused/small/hidden.cuh"
#include "fused/small/softmax.cuh"
#include "fused/small/tiles.cuh"
#include "fused/small/warp_rows.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct ForwardArguments : KeyMask<Plan> {
  View<const typename Plan::Element, Plan::kRank> query, key, value;
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;
};

// Where the rows of a block lie in global memory: the origin of each array, and the offset of each
// row from there.
template <typename Plan>
struct QueryRows {
  struct Offsets {
    unsigned query, output, lse;
  };

  Origin<const typename Plan::Element> query;
  Origin<typename Plan::Element> output;
  Origin<float> lse;
  Offsets offsets[SmallTables<Plan>::kRows];
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    forward(const SmallWindowProblem<Plan::kRank> problem, const ForwardArguments<Plan> arguments
#ifdef CUNEIGH_TMA
            ,
            const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map
#endif
    ) {
  using Element = typename Plan::Element;
  constexpr int kColumnTiles = Plan::kColumns / 8;
  static_assert(
      sizeof(ForwardArguments<Plan>) == (5 + Plan::kKeyMask) * sizeof(View<float, Plan::kRank>),
      "`forward` in cuneigh/_backends/fused/launch.py packs these views");
  // Dimensions of the output at a time: what registers hold beside the logits. Where there is only
  // one stage, its weights can be multiplied with one part of the values after another.
  constexpr int kMost = Plan::kLse && Plan::kColumns + Plan::kValueDim > 200 ? 32 : 64;
  constexpr int kPart = Plan::kOneStage && Plan::kValueDim > kMost ? kMost : Plan::kValueDim;
  // All parts but the last are written where they are computed, even if every key is hidden
  constexpr bool kWritesParts = kPart < Plan::kValueDim;
  extern __shared__ __align__(128) char memory_smem[];
  auto& smem = *reinterpret_cast<SmallSmem<Plan, Plan::kHeadDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ QueryRows<Plan> rows;
  __shared__ Barrier full[Plan::kBuffers];  // of stages that TMA brings
  using Offsets = typename QueryRows<Plan>::Offsets;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (kByTma && threadIdx.x < Plan::kBuffers) {
    full[threadIdx.x].init(1);
    fence_barrier_init();
  }
  fill_row_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    rows.offsets[row] = {offset_of(arguments.query, token), offset_of(arguments.output, token),
                         offset_of(arguments.lse, token)};
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.query = origin_of_rows(arguments.query, head);
    rows.output = origin_of_rows(arguments.output, head);
    rows.lse = origin_of_rows(arguments.lse, head);
  }
  if constexpr (kMaskedColumns<Plan>)
    fill_column_tables<Plan>(problem, arguments.key, arguments.value, arguments.key_mask, smem);
  else
    fill_column_tables<Plan>(problem, arguments.key, arguments.value, arguments.lse, smem);
  SeenColumns<Plan> seen;
  seen.begin(problem, arguments, smem);
  fill_tiles<Plan>(problem, warp, lane, smem);
  __syncthreads();

  // The rows of a batch-head come with its first stage, in the buffers for rows by turns
  int row_buffer = 0;
  auto load = [&](const StageOf& stage, int buffer, int row_buffer) {
#ifdef CUNEIGH_TMA
    if (threadIdx.x == 0)
      load_stage_box<Plan>(problem, stage, key_map, value_map, full[buffer], smem, buffer);
#else
    load_stage(problem, stage, tables.qk, tables.vo, smem, buffer, threadIdx.x);
#endif
    if (stage.is_first())
      load_warp_rows<Plan::kHeadDim, &Offsets::query>(in_batch(rows.query, stage.batch),
                                                      &rows.offsets[warp * 16], lane,
                                                      &smem.row[row_buffer][warp * 16], 0);
    cp_async_commit();
    if (Plan::kBuffers == 2) seen.look(problem, stage, smem);
  };
  StageOf stage = {tables.rows.batch * problem.batch_heads, 0, 0};
  load(stage, 0, 0);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8 keys or dimensions
  const int first_row = warp * 16 + lane / 4;
  float output_rmem[kPart / 8][4] = {};  // kPart dimensions of O [16, kValueDim]
  TileSoftmax<Plan> softmax;

  // O /= sum(P): writes the part of the output from the dimension `begin` on
  const auto write = [&](int batch, int begin) {
    Element* output = in_batch(rows.output, batch) + begin;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      const auto offsets = rows.offsets[row];
      const bool exists = tables.exists[row];
      const float sum = softmax.sum(half);
      store_row<kPart>(output_rmem, half, softmax.normalizer(sum), exists, lane,
                       offset_by(output, offsets.output));
      if (Plan::kLse && begin == 0 && lane % 4 == 0 && exists)
        *offset_by(in_batch(rows.lse, batch), offsets.lse) = softmax.lse(half, sum);
    }
#pragma unroll
    for (int d = 0; d < kPart / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) output_rmem[d][i] = 0;
  };

  for (int buffer = 0;; buffer ^= Plan::kBuffers - 1) {
    if (Plan::kBuffers == 1) seen.look(problem, stage, smem);  // not before the last was written
    cp_async_wait<0>();
    if (kByTma) full[buffer].wait(stages_before(problem, stage, tables) / Plan::kBuffers % 2);
    const Hidden hidden = seen.wait(problem, arguments, stage, smem, buffer, kVo);
    StageOf next = stage;
    bool more;
    if (Plan::kBuffers == 2) {
      more = advance<Plan>(problem, tables, next);
      if (more) load(next, buffer ^ 1, next.is_first() ? row_buffer ^ 1 : row_buffer);
    }

    const unsigned first = smem.tile(stage.index, warp);
    if ((Plan::kOneStage || first != kNoTile) && (hidden != kEveryColumn || kWritesParts)) {
      const TileAddresses<Plan> tile(smem.stage_address(buffer), first, tables.tile_offset, lane);

      // S = Q K^T
      float logit_rmem[kColumnTiles][4];  // S [16, kColumns]
#pragma unroll
      for (int d = 0; d < Plan::kHeadDim; d += 16) {
        unsigned query_rmem[4];  // Q[:, d : d + 16]
        load_row_operand(&smem.row[row_buffer][warp * 16], d, lane, query_rmem);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          unsigned key_rmem[4];  // K[8 * n : 8 * n + 16, d : d + 16]
          ldmatrix_x4(key_rmem, chunk_address<Plan>(problem, tile.nt(n * 8), d / 8));
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

      LaneMasks<Plan> visible = smem.visible(stage.index, warp, lane);
      if (hidden) visible &= seen.of_tile(smem, first);
      softmax.rescale(logit_rmem, visible, problem.scale, output_rmem);

      // P = exp(scale * S - row_max), and O += P V, kPart dimensions of it at a time
      unsigned weight_rmem[kColumnTiles / 2][4];  // P [16, kColumns]
#pragma unroll
      for (int begin = 0; begin < Plan::kValueDim; begin += kPart) {
        if (begin > 0) write(stage.batch, begin - kPart);
#pragma unroll
        for (int n = 0; n < kColumnTiles; n += 2) {
          unsigned (&weights)[4] = weight_rmem[n / 2];
          if (begin == 0) softmax.exponentiate(&logit_rmem[n], problem.scale, weights);
          const unsigned values = tile.nn(n * 8);
#pragma unroll
          for (int d = 0; d < kPart; d += 16) {
            unsigned value_rmem[4];  // V[8 * n : 8 * n + 16, begin + d : begin + d + 16]
            ldmatrix_x4_trans(
                value_rmem, chunk_address<Plan>(problem, values, (Plan::kHeadDim + begin + d) / 8));
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
    const int batch = stage.batch;
    stage = next;
    if (more && !next.is_first()) continue;
    row_buffer ^= Plan::kBuffers - 1;

    // After the last stage of a batch-head
    write(batch, Plan::kValueDim - kPart);
    softmax.reset();
    if (!more) break;
  }
}

}  // namespace cuneigh::fused::small
