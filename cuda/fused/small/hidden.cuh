// Keys that a mask hides (cuneigh/key_mask.cuh), as columns and as rows.
//
// A hidden column has no weight, but what lies in its vectors, be it NaN, is multiplied by that: it
// is set to zero in shared memory. That happens only in stages that have hidden columns; of others
// no more is done than to look. Rows do not meet each other: hidden ones get zeros for gradients.
#pragma once

#include "cuneigh/key_mask.cuh"
#include "fused/small/stages.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::small {

// Which columns of a stage are hidden.
enum Hidden : int { kNoColumn, kSomeColumns, kEveryColumn };

// Vectors of a column.
enum Vectors : int { kQk = 1, kVo = 2, kBoth = 3 };

// What a block knows of masked columns. Each thread looks after some columns of a stage: it asks
// for what the mask says of them when the stage is asked for.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct SeenColumns {
  template <typename Problem, typename Arguments, typename Smem>
  __device__ void begin(const Problem&, const Arguments&, Smem&) {}
  template <typename Problem, typename Smem>
  __device__ void look(const Problem&, const StageOf&, Smem&) {}
  // Waits for all threads of the block. The stage has arrived in `buffer`, and perhaps its tangents
  // in the next one. Of hidden columns those vectors are set to zero that are multiplied by weights
  // that are 0.
  template <typename Problem, typename Arguments, typename Smem>
  __device__ Hidden wait(const Problem&, const Arguments&, const StageOf&, Smem&, int, Vectors,
                         int = 1) {
    __syncthreads();
    return kNoColumn;
  }
  template <typename Smem>
  __device__ LaneBits<Plan> of_tile(Smem&, unsigned) const {
    return 0;
  }
};
template <typename Plan>
struct SeenColumns<Plan, true> {
  static constexpr int kRank = Plan::kRank, kThreads = 32 * Plan::kWarps;
  static constexpr int kAhead = kByTma || Plan::kOneStage ? 2 : 1;  // registers are few
  bool is_seen[kAhead];  // what the mask says of the columns threadIdx.x + i * kThreads, on its way

  // When the tables of rows are filled.
  template <typename Smem>
  __device__ void begin(const SmallWindowProblem<kRank>& problem, const KeyMask<Plan>& given,
                        Smem& smem) {
    if (!kByTma) return;
    for (int column = threadIdx.x; column < kAhead * kThreads; column += kThreads)
      offset_ahead(column) = offset_of_column(problem, given, smem, column);
  }

  template <typename Smem>
  __device__ void look(const SmallWindowProblem<kRank>& problem, const StageOf& stage, Smem& smem) {
    const auto& tables = smem.tables;
    const bool* mask = first_column_of(problem, tables.extra, stage, tables);
    const int thread = forgotten(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = thread + i * kThreads;
      const unsigned offset =
          kByTma ? offset_ahead(column)
                 : smem.column_offsets()[smaller(column, tables.stage_columns - 1)].extra;
      is_seen[i] = *offset_by(mask, offset);
    }
  }

  template <typename Smem>
  __device__ Hidden wait(const SmallWindowProblem<kRank>& problem, const KeyMask<Plan>& given,
                         const StageOf& stage, Smem& smem, int buffer, Vectors vectors,
                         int buffers = 1) {
    const auto& tables = smem.tables;
    const int columns = tables.stage_columns;
    const auto shows = [&](int column) {
      const bool* mask = first_column_of(problem, tables.extra, stage, tables);
      return *offset_by(mask, offset_of_column(problem, given, smem, column));
    };
    bool all = true, any = false;
#pragma unroll
    for (const bool each : is_seen) all &= each;
    // Stages rarely have more. Rounds are the same for all threads, and so are the results of
    // votes: so the compiler sees that warps stay together
#pragma unroll 1
    for (int first = kAhead * kThreads; first < columns; first += kThreads)
      all &= shows(first + forgotten(threadIdx.x));
    if (!__any_sync(0xffffffffu, __syncthreads_or(!all))) return kNoColumn;

#pragma unroll 1
    for (int first = 0; first < columns; first += kThreads) {
      const int thread = forgotten(threadIdx.x), column = first + thread;
      const bool is_seen = shows(column);
      any |= is_seen;
      const unsigned word = __ballot_sync(0xffffffffu, is_seen);
      if (column >= columns) continue;
      if (thread % 32 == 0) smem.seen()[column / 32] = word;
      if (is_seen) continue;
#pragma unroll 1
      for (int i = 0; i < buffers; ++i)
        clear(problem, smem.stage_address(buffer + i), column, vectors, smem);
    }
    if (kByTma) fence_shared();
    const bool sees = __any_sync(0xffffffffu, __syncthreads_or(any));
    return sees ? kSomeColumns : kEveryColumn;
  }

  // The lane's bits of the columns of a tile that may be seen; `first` is what SmallSmem::tile
  // says.
  template <typename Smem>
  __device__ LaneBits<Plan> of_tile(Smem& smem, unsigned first) const {
    const int lane = forgotten(threadIdx.x) % 32;
    LaneBits<Plan> bits = 0;
#pragma unroll
    for (int n = 0; n < Plan::kColumns; n += 32) {
      const int slot = n + lane;
      bool is_seen = false;
      if (slot < Plan::kColumns) {
        const unsigned offset = smem.tables.tile_offset[slot];
        const unsigned column =
            kByTma ? first + offset / kColumnBytes<Plan> : (first + offset) / kColumnBytes<Plan>;
        is_seen = smem.seen()[column / 32] >> column % 32 & 1;
      }
      // Of every eight of the 32 columns the lane has two
      unsigned mine = __ballot_sync(0xffffffffu, is_seen) >> lane % 4 * 2 & 0x03030303;
      mine = (mine | mine >> 6) & 0x000f000f;
      bits |= LaneBits<Plan>((mine | mine >> 12) & 0xff) << n / 4;
    }
    return bits;
  }

 private:
  // Units from the mask of a stage's first column to that of another one, where TMA brings stages;
  // the thread alone writes and reads it.
  __device__ static unsigned& offset_ahead(int column) {
    __shared__ unsigned offsets[kByTma ? kAhead * kThreads : 1];
    return offsets[column];
  }
  // Likewise, of any column; past the end, of the last.
  template <typename Smem>
  __device__ static unsigned offset_of_column(const SmallWindowProblem<kRank>& problem,
                                              const KeyMask<Plan>& given, Smem& smem, int column) {
    const auto& tables = smem.tables;
    column = smaller(column, tables.stage_columns - 1);
    if (!kByTma) return smem.column_offsets()[column].extra;
    int token[kRank];
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      const FastDivmod size = problem.stage[r];
      const Axis& axis = problem.axes[r];
      const int group = column_group<Plan>(axis, tables.rows.first[r].group);
      const int first = axis.token({group, tables.block_union[r].begin});
      // TMA brings all tokens of its box, those past the union of windows, too
      token[r] = smaller((r == 0 ? column : size.remainder(column)) * axis.dilation,
                         axis.key_length - 1 - first);
      column = size.quotient(column);
    }
    return offset_of(given.key_mask, token);
  }
  // Sets vectors of a column to zero. Lanes write to different banks, as columns have phases.
  template <typename Smem>
  __device__ static void clear(const SmallWindowProblem<kRank>& problem, unsigned stage, int column,
                               Vectors vectors, Smem& smem) {
    constexpr int kQkChunks = Plan::kHeadDim / 8, kChunks = kQkChunks + Plan::kValueDim / 8;
    unsigned in_stage;
    if (kByTma)
      in_stage =
          column * kColumnBytes<Plan> + (Plan::kHeadDim == 32 ? column / 2 % 4 : column % 8) * 16;
    else
      in_stage = smem.column_offsets()[column].in_stage;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      if (vectors & (chunk < kQkChunks ? kQk : kVo))
        *static_cast<uint4*>(
            __cvta_shared_to_generic(chunk_address<Plan>(problem, stage + in_stage, chunk))) = {};
  }
};

// Where the mask is for the rows of a block, if they are keys and masked.
template <typename Plan, bool kMasked = Plan::kKeyMask && Plan::kRowsAreKeys>
struct RowMask {
  __device__ void fill(const KeyMask<Plan>&, int, const int (&)[Plan::kRank]) {}
  __device__ void begin(const KeyMask<Plan>&, int) {}
  // Looks which of a warp's sixteen rows are hidden in an element of the batch. All lanes must ask.
  __device__ void look(int) {}
  __device__ bool any_is_seen() const { return true; }
  // Of a lane's two rows.
  __device__ bool hides(int) const { return false; }
};
template <typename Plan>
struct RowMask<Plan, true> {
  Origin<const bool> mask;
  unsigned mask_offset[SmallTables<Plan>::kRows];
  unsigned hidden[Plan::kWarps];  // bits of the rows at hand

  __device__ void fill(const KeyMask<Plan>& given, int row, const int (&token)[Plan::kRank]) {
    mask_offset[row] = offset_of(given.key_mask, token);
  }
  __device__ void begin(const KeyMask<Plan>& given, int head) {
    mask = origin_of_rows(given.key_mask, head);
  }
  __device__ void look(int batch) {
    const int thread = forgotten(threadIdx.x);  // or more addresses would be kept
    const unsigned offset = mask_offset[thread / 32 * 16 + thread % 16];
    const unsigned seen = __ballot_sync(0xffffffffu, *offset_by(in_batch(mask, batch), offset));
    if (thread % 32 == 0) hidden[thread / 32] = ~seen & 0xffff;
    __syncwarp();
  }
  __device__ bool any_is_seen() const { return hidden[forgotten(threadIdx.x) / 32] != 0xffff; }
  __device__ bool hides(int half) const {
    const int thread = forgotten(threadIdx.x);
    return hidden[thread / 32] >> (thread % 32 / 4 + half * 8) & 1;
  }
};

}  // namespace cuneigh::fused::small
