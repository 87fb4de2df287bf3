// All three gradients in one launch, where a block holds a whole dilation group: its tokens are all
// that see each other, so that every vector is brought to shared memory once, by TMA, and there is
// no halo. Rows and columns both lie in that one stage.
//
// The tokens are cut into boxes of up to sixteen rows. A warp takes some of them as queries, and
// then as keys: the products are those of fused/small/backward.cu. Before, every thread computes
// the statistics of some queries.
//
// blockIdx.x: (which elements of the batch, head, dilation group). The plan:
//
//   kRank, kHeadDim, kValueDim, Element
//   kWarps         warps of a block
//   kBlocks        blocks that a multiprocessor is to work on at a time
//   kBuffers       stages in shared memory: of two, one arrives while the other is worked on
//   kBoxes         boxes that a block has room for, an even number
//   kColumns       slots of a tile
//   kContiguous    whether the columns of a tile follow each other in the stage, too
//   kTileExtents   as for other kernels of small windows

#include "cuneigh/softmax.cuh"
#include "fused/small/boxes.cuh"
#include "fused/small/gradients.cuh"
#include "fused/small/tiles.cuh"
#include "fused/small/warp_rows.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct WholeArguments {
  View<typename Plan::Element, Plan::kRank> grad_query, grad_key, grad_value;
  View<const float, Plan::kRank> lse, grad_lse;  // grad_lse may be null
};

// Arrays of a stage, in this order.
enum WholeArray { kKeyArray, kValueArray, kQueryArray, kGradOutputArray, kOutputArray, kArrays };

// The plan of other kernels of small windows for rows that are queries or keys, each box being that
// of a warp of theirs.
template <typename Plan, bool kKeys>
struct PassOf : Plan {
  static constexpr int kWarps = Plan::kBoxes;
  static constexpr bool kRowsAreKeys = kKeys, kOneStage = true, kKeyMask = false;
};

// Of each row: units from the token at 0 to it in the gradients, and its column in the stage.
struct WholeRow {
  unsigned grad_query, grad_key, grad_value, column;
};

// What is kept of the tables of a pass.
template <typename Pass>
struct BoxTables {
  LaneMasks<Pass> masks[Pass::kWarps * 32];
  alignas(8) int tile_offset[Pass::kColumns];
  unsigned tiles[Pass::kWarps];
};

// As `fill_tiles` takes shared memory.
template <typename Pass>
struct FilledTables {
  const SmallTables<Pass>& tables;
  BoxTables<Pass>& boxes;

  __device__ LaneMasks<Pass>& visible(int, int box, int lane) const {
    return boxes.masks[box * 32 + lane];
  }
  __device__ unsigned& tile(int, int box) const { return boxes.tiles[box]; }
};

template <typename Plan>
struct WholeTables {
  static constexpr int kRank = Plan::kRank, kRows = Plan::kBoxes * 16;
  // Columns of a stage, some for every thread
  static constexpr int kMost = 2 * Plan::kWarps * 32;

  BoxTables<PassOf<Plan, false>> as_queries;
  BoxTables<PassOf<Plan, true>> as_keys;
  WholeRow rows[kRows];
  alignas(8) float2 statistics[kMost];  // {lse * log2(e), delta} of the columns
  bool exists[kRows];
  union Scratch {  // while tables are filled
    SmallTables<PassOf<Plan, false>> as_queries;
    SmallTables<PassOf<Plan, true>> as_keys;
    __device__ Scratch() {}
  } scratch;
};

// Fills the tables of a pass, as a block. keep(row, token, exists) is called for all rows.
template <typename Plan, typename Pass, typename Keep>
__device__ void fill_boxes(const SmallWindowProblem<Plan::kRank>& problem,
                           const RowBox<Plan::kRank>& rows, SmallTables<Pass>& scratch,
                           BoxTables<Pass>& boxes, Keep keep) {
  constexpr int kThreads = Plan::kWarps * 32, kRows = Plan::kBoxes * 16;
  if (threadIdx.x == 0) {
    scratch.stages = 1;
#pragma unroll
    for (int r = 0; r < Plan::kRank; ++r)
      scratch.block_union[r] = {0, rows_of_group<Pass>(problem.axes[r], rows.first[r].group)};
  }
#pragma unroll 1
  for (int row = threadIdx.x; row < kRows; row += kThreads)
    fill_row<Pass>(problem, rows, row, scratch, keep);
  fill_tile_tables<Pass, Plan::kWarps>(problem, scratch);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < Plan::kColumns; i += kThreads)
    boxes.tile_offset[i] = scratch.tile_offset[i];
  FilledTables<Pass> filled = {scratch, boxes};
#pragma unroll 1
  for (int box = threadIdx.x / 32; box < Plan::kBoxes; box += Plan::kWarps)
    fill_tiles<Pass>(problem, box, threadIdx.x % 32, filled);
  __syncthreads();
}

template <typename Pass>
__device__ auto tile_of(unsigned arrays, unsigned first, const BoxTables<Pass>& boxes, int lane) {
  if constexpr (Pass::kContiguous)
    return ContiguousTile<Pass>(arrays, first, lane);
  else
    return TileAddresses<Pass>(arrays, first, boxes.tile_offset, lane);
}

// The gradients of a box of rows. `row_arrays` and `column_arrays` are where the first of both
// arrays of rows and of columns lie.
template <typename Pass>
__device__ void gradients_of_box(const SmallWindowProblem<Pass::kRank>& problem,
                                 const BoxTables<Pass>& boxes, const WholeRow* rows,
                                 const float2* statistics, int box, int lane, float scale,
                                 unsigned row_arrays, unsigned column_arrays,
                                 float (&grad_qk)[Pass::kHeadDim / 8][4],
                                 float (&grad_v)[Pass::kValueDim / 8][4]) {
  constexpr int kDim = Pass::kHeadDim;
  unsigned row_rmem[2][kDim / 16][4];  // both vectors of the rows, [16, kDim] each
  {
    const unsigned column = rows[box * 16 + lane % 16].column;
    const unsigned phase = kDim == 32 ? column / 2 % 4 : column % 8;
    const unsigned address = row_arrays + column * kDim * 2 + (phase ^ lane / 16) * 16;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      ldmatrix_x4(row_rmem[0][d / 16], address ^ d * 2);
      ldmatrix_x4(row_rmem[1][d / 16], (address ^ d * 2) + problem.vo_offset);
    }
  }
  const auto row_qk = [&](int d, unsigned (&operand)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[i] = row_rmem[0][d / 16][i];
  };
  const auto row_vo = [&](int d, unsigned (&operand)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[i] = row_rmem[1][d / 16][i];
  };
  const unsigned first = boxes.tiles[box];
  const LaneMasks<Pass> masks = boxes.masks[box * 32 + lane];
  const auto tile = tile_of(column_arrays, first, boxes, lane);
  const float2* of_first = statistics + first;
  PairStatistics of_rows;
  if constexpr (!Pass::kRowsAreKeys)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      of_rows.of[half] = statistics[rows[box * 16 + lane / 4 + half * 8].column];
  const auto statistics_of = [&](int n) {
    if constexpr (!Pass::kRowsAreKeys) {
      return of_rows;
    } else if constexpr (Pass::kContiguous) {
      const float2* of_pair = of_first + n + lane % 4 * 2;
      return PairStatistics{{of_pair[0], of_pair[1]}};
    } else {
      const uint2 offset = tile.pair(n);
      return PairStatistics{
          {of_first[offset.x / kColumnBytes<Pass>], of_first[offset.y / kColumnBytes<Pass>]}};
    }
  };
  const int columns = problem.tile[0] * inner_columns(problem);
#pragma unroll 1
  for (int n = 0; n < columns; n += 16) {
    LaneMasks<Pass> visible;
    visible.row[0] = masks.row[0] >> (n / 4) & 0xf;
    visible.row[1] = masks.row[1] >> (n / 4) & 0xf;
    if (!__any_sync(0xffffffffu, unsigned(visible.row[0] | visible.row[1]))) continue;
    add_columns(problem, tile, n, row_qk, row_vo, scale, visible, 0, statistics_of, grad_qk,
                grad_v);
  }
}

// sum(grad_output * output) of a column of the stage, the addresses being those of the arrays.
template <typename Plan>
__device__ float delta_of_column(unsigned grad_output, unsigned output, int column) {
  using Element = typename Plan::Element;
  constexpr int kDim = Plan::kHeadDim;
  const unsigned phase = kDim == 32 ? column / 2 % 4 : column % 8;
  float delta = 0;
#pragma unroll
  for (int chunk = 0; chunk < kDim / 8; ++chunk) {
    const unsigned offset = column * kDim * 2 + (phase ^ chunk) * 16;
    alignas(16) Element a[8], b[8];
    *reinterpret_cast<uint4*>(a) =
        *static_cast<const uint4*>(__cvta_shared_to_generic(grad_output + offset));
    *reinterpret_cast<uint4*>(b) =
        *static_cast<const uint4*>(__cvta_shared_to_generic(output + offset));
#pragma unroll
    for (int i = 0; i < 8; ++i) delta = fmaf(convert<float>(a[i]), convert<float>(b[i]), delta);
  }
  return delta;
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    whole(const SmallWindowProblem<Plan::kRank> queries,
          const SmallWindowProblem<Plan::kRank> keys,  // which differ in their tile
          const WholeArguments<Plan> arguments, const __grid_constant__ TensorMap key_map,
          const __grid_constant__ TensorMap value_map, const __grid_constant__ TensorMap query_map,
          const __grid_constant__ TensorMap grad_output_map,
          const __grid_constant__ TensorMap output_map) {
  using Element = typename Plan::Element;
  using AsQueries = PassOf<Plan, false>;
  using AsKeys = PassOf<Plan, true>;
  constexpr int kRank = Plan::kRank, kDim = Plan::kHeadDim, kThreads = Plan::kWarps * 32;
  constexpr int kPerThread = WholeTables<Plan>::kMost / kThreads;
  static_assert(kDim == Plan::kValueDim, "boxes hold vectors of one length");
  static_assert(sizeof(WholeTables<Plan>) == Plan::kTableBytes,
                "`table_bytes` in cuneigh/_backends/fused/small/whole.py counts them");
  extern __shared__ __align__(128) char memory_smem[];
  __shared__ Barrier full[Plan::kBuffers];
  auto& tables = *reinterpret_cast<WholeTables<Plan>*>(memory_smem);
  const unsigned end_of_tables = shared_address(memory_smem) + sizeof(WholeTables<Plan>);
  const unsigned first_stage = (end_of_tables + kBoxAlignment - 1) / kBoxAlignment * kBoxAlignment;
  const unsigned array_bytes = queries.vo_offset;
  const auto array_of = [&](int array, int buffer) {
    return first_stage + (array + (Plan::kBuffers == 1 ? 0 : buffer * kArrays)) * array_bytes;
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const RowBox<kRank> rows = row_box<AsQueries>(queries);
  int columns = 1, boxes = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) columns *= queries.stage[r], boxes *= queries.warps[r];
  const int begin = rows.batch * queries.batch_heads;
  const int end = smaller(begin + queries.batch_heads, queries.batch);

  // One thread has TMA bring the vectors of an element of the batch
  const auto load = [&](int batch, int buffer) {
    int c[5];
    find_head<AsQueries>(queries, batch, rows.head, c);
#pragma unroll
    for (int r = 0; r < kRank; ++r) c[kRank - r] = queries.axes[r].token({rows.first[r].group, 0});
    full[buffer].arrive_and_expect(kArrays * columns * kDim * 2);
    load_box(array_of(kKeyArray, buffer), key_map, full[buffer], c);
    load_box(array_of(kValueArray, buffer), value_map, full[buffer], c);
    load_box(array_of(kQueryArray, buffer), query_map, full[buffer], c);
    load_box(array_of(kGradOutputArray, buffer), grad_output_map, full[buffer], c);
    load_box(array_of(kOutputArray, buffer), output_map, full[buffer], c);
  };
  if (threadIdx.x == 0) {
#pragma unroll
    for (int buffer = 0; buffer < Plan::kBuffers; ++buffer) full[buffer].init(1);
    fence_barrier_init();
    load(begin, 0);
  }

  if (Plan::kContiguous) {  // past the last column zeros are read
    const unsigned first_byte = columns * kDim * 2, count = (array_bytes - first_byte) / 16;
    for (int i = threadIdx.x; i < kArrays * Plan::kBuffers * count; i += kThreads) {
      const unsigned address = first_stage + i / count * array_bytes + first_byte + i % count * 16;
      *static_cast<uint4*>(__cvta_shared_to_generic(address)) = {};
    }
    for (int i = columns + threadIdx.x; i < WholeTables<Plan>::kMost; i += kThreads)
      tables.statistics[i] = {};
  }

  fill_boxes<Plan>(queries, rows, tables.scratch.as_queries, tables.as_queries,
                   [&](int row, const int (&token)[kRank]) {
                     int column = 0;
#pragma unroll
                     for (int r = 0; r < kRank; ++r)
                       column = column * queries.stage[r] + token[r] / queries.axes[r].dilation;
                     tables.rows[row] = {offset_of(arguments.grad_query, token),
                                         offset_of(arguments.grad_key, token),
                                         offset_of(arguments.grad_value, token), unsigned(column)};
                     tables.exists[row] = tables.scratch.as_queries.exists[row];
                   });
  fill_boxes<Plan>(keys, rows, tables.scratch.as_keys, tables.as_keys,
                   [](int, const int (&)[kRank]) {});

  // This thread's columns, and what is read of them: lse and its gradient
  unsigned lse_units[kPerThread], grad_lse_units[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    int rest = threadIdx.x + i * kThreads, token[kRank];
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const FastDivmod size = queries.stage[r];
      const int index = r == 0 ? rest : size.remainder(rest);
      const int length = rows_of_group<AsQueries>(queries.axes[r], rows.first[r].group);
      token[r] = queries.axes[r].token({rows.first[r].group, smaller(index, length - 1)});
      rest = size.quotient(rest);
    }
    lse_units[i] = offset_of(arguments.lse, token);
    grad_lse_units[i] = offset_of(arguments.grad_lse, token);
  }
  const auto lse_origin = origin_of_rows(arguments.lse, rows.head);
  const auto grad_lse_origin = origin_of_rows(arguments.grad_lse, rows.head);
  float lse[kPerThread], grad_lse[kPerThread];
  const auto read = [&](int batch) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      lse[i] = *offset_by(in_batch(lse_origin, batch), lse_units[i]);
      grad_lse[i] = grad_lse_origin.data == nullptr
                        ? 0.0f
                        : *offset_by(in_batch(grad_lse_origin, batch), grad_lse_units[i]);
    }
  };
  read(begin);

  const auto grad_query = origin_of_rows(arguments.grad_query, rows.head);
  const auto grad_key = origin_of_rows(arguments.grad_key, rows.head);
  const auto grad_value = origin_of_rows(arguments.grad_value, rows.head);
  const float scale = in_register(queries.scale);
#pragma unroll 1
  for (int batch = begin, buffer = 0;; ++batch, buffer ^= Plan::kBuffers - 1) {
    const bool more = batch + 1 < end;
    full[buffer].wait((batch - begin) / Plan::kBuffers % 2);
    if (Plan::kBuffers == 2 && more && threadIdx.x == 0) load(batch + 1, buffer ^ 1);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int column = threadIdx.x + i * kThreads;
      if (column >= columns) continue;
      const float delta = delta_of_column<Plan>(array_of(kGradOutputArray, buffer),
                                                array_of(kOutputArray, buffer), column);
      tables.statistics[column] = {kLog2E * finite_lse(lse[i]), delta - grad_lse[i]};
    }
    if (more) read(batch + 1);
    __syncthreads();

    const unsigned of_keys = array_of(kKeyArray, buffer),
                   of_queries = array_of(kQueryArray, buffer);
#pragma unroll 1
    for (int box = warp; box < boxes; box += Plan::kWarps) {
      float grad[kDim / 8][4] = {}, none[kDim / 8][4];
      gradients_of_box<AsQueries>(queries, tables.as_queries, tables.rows, tables.statistics, box,
                                  lane, scale, of_queries, of_keys, grad, none);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = box * 16 + lane / 4 + half * 8;
        store_row<kDim>(grad, half, queries.gradient_scale, tables.exists[row], lane,
                        offset_by(in_batch(grad_query, batch), tables.rows[row].grad_query));
      }
    }
#pragma unroll 1
    for (int box = warp; box < boxes; box += Plan::kWarps) {
      float grad_k[kDim / 8][4] = {}, grad_v[kDim / 8][4] = {};
      gradients_of_box<AsKeys>(keys, tables.as_keys, tables.rows, tables.statistics, box, lane,
                               scale, of_keys, of_queries, grad_k, grad_v);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = box * 16 + lane / 4 + half * 8;
        const bool exists = tables.exists[row];
        store_row<kDim>(grad_k, half, keys.gradient_scale, exists, lane,
                        offset_by(in_batch(grad_key, batch), tables.rows[row].grad_key));
        store_row<kDim>(grad_v, half, 1.0f, exists, lane,
                        offset_by(in_batch(grad_value, batch), tables.rows[row].grad_value));
      }
    }
    if (!more) break;
    __syncthreads();
    if (Plan::kBuffers == 1 && threadIdx.x == 0) load(batch + 1, 0);
  }
}

}  // namespace cuneigh::fused::small
