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

// What a block knows of masked columns. It looks at the mask for some elements of the batch at
// once, or where it is the same for all, once, and keeps that in shared memory.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct SeenColumns {
  template <typename Problem, typename Smem>
  __device__ void look(const Problem&, const StageOf&, Smem&) {}
  // Waits for all threads of the block. `buffer` holds the stage, which has arrived. Of a stage all
  // of which is hidden nothing may be used, unless it `is_used`.
  template <typename Smem>
  __device__ Hidden wait(Smem&, const StageOf&, int, bool = false) {
    __syncthreads();
    return kNoColumn;
  }
  template <typename Smem>
  __device__ LaneBits<Plan> of_tile(Smem&, const StageOf&, unsigned, int) const {
    return 0;
  }
};
template <typename Plan>
struct SeenColumns<Plan, true> {
  static constexpr int kThreads = Plan::kWarps * 32;
  int first_batch = 0;  // of the elements that were looked at

  // Before the first stage of each element. All threads of the block must call it.
  template <typename Problem, typename Smem>
  __device__ void look(const Problem& problem, const StageOf& stage, Smem& smem) {
    const auto& tables = smem.tables;
    const int begin = tables.rows.batch * problem.batch_heads;
    const bool is_due = tables.extra.batch == 0 ? stage.batch == begin
                                                : (stage.batch - begin) % kMaskedElements == 0;
    if (!stage.is_first() || !is_due) return;
    first_batch = stage.batch;
    const int end = smaller(begin + problem.batch_heads, problem.batch);
    const int elements = tables.extra.batch == 0 ? 1 : smaller(kMaskedElements, end - stage.batch);
    __syncthreads();  // the words may be in use
    const int thread = forgotten(threadIdx.x), lane = thread % 32;
#pragma unroll 1
    for (int i = thread / 32; i < elements * tables.stages; i += Plan::kWarps) {
      const StageOf of = {stage.batch + i / tables.stages, 0, i % tables.stages};
      look_at(first_column_of(problem, tables.extra, of, tables), lane,
              smem.seen(i / tables.stages, of.index), smem);
    }
  }

  template <typename Smem>
  __device__ Hidden wait(Smem& smem, const StageOf& stage, int buffer, bool is_used = false) {
    const auto& tables = smem.tables;
    __syncthreads();
    const unsigned* words = words_of(smem, stage);
    const Hidden hidden = Hidden(words[-1]);
    if (hidden == kNoColumn || (hidden == kEveryColumn && !is_used)) return hidden;
    constexpr int kChunks = (Plan::kHeadDim + Plan::kValueDim) / 8;
#pragma unroll 1
    for (int column = forgotten(threadIdx.x); column < tables.stage_columns; column += kThreads) {
      if (words[column / 32] >> column % 32 & 1) continue;
      const unsigned address = smem.stage_address(buffer) + smem.column_offsets()[column].in_stage;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        *static_cast<uint4*>(__cvta_shared_to_generic(chunk_address(address, chunk))) = {};
    }
    __syncthreads();
    return hidden;
  }

  // The lane's bits of the columns of a tile that may be seen; `first` is what SmallSmem::tile
  // says.
  template <typename Smem>
  __device__ LaneBits<Plan> of_tile(Smem& smem, const StageOf& stage, unsigned first,
                                    int lane) const {
    const unsigned* words = words_of(smem, stage);
    LaneBits<Plan> bits = 0;
#pragma unroll
    for (int n = 0; n < Plan::kColumns; n += 32) {
      const int slot = n + lane;
      bool is_seen = false;
      if (slot < Plan::kColumns) {
        const unsigned column = (first + smem.tables.tile_offset[slot]) / kColumnBytes<Plan>;
        is_seen = words[column / 32] >> column % 32 & 1;
      }
      // Of every eight of the 32 columns the lane has two
      unsigned mine = __ballot_sync(0xffffffffu, is_seen) >> lane % 4 * 2 & 0x03030303;
      mine = (mine | mine >> 6) & 0x000f000f;
      bits |= LaneBits<Plan>((mine | mine >> 12) & 0xff) << n / 4;
    }
    return bits;
  }

 private:
  // A bit for each column of a stage that may be seen, after the number that says how many.
  template <typename Smem>
  __device__ const unsigned* words_of(Smem& smem, const StageOf& stage) const {
    const int element = smem.tables.extra.batch == 0 ? 0 : stage.batch - first_batch;
    return smem.seen(element, stage.index) + 1;
  }
  // Writes what the mask says of a stage, as a warp. `mask` is where it is for the first column.
  template <typename Smem>
  __device__ static void look_at(const bool* mask, int lane, unsigned* seen, Smem& smem) {
    constexpr int kUnroll = 8;
    const int columns = smem.tables.stage_columns;
    bool hides = false, shows = false;
#pragma unroll 1
    for (int begin = lane; begin - lane < columns; begin += 32 * kUnroll) {
      bool is_seen[kUnroll];  // all loaded before the first ballot
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int column = begin + i * 32;
        is_seen[i] = column < columns && *offset_by(mask, smem.extra_offset(column));
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int column = begin + i * 32;
        const unsigned word = __ballot_sync(0xffffffffu, is_seen[i]);
        if (lane == 0 && column < columns) seen[1 + column / 32] = word;
        hides |= column < columns && !is_seen[i];
        shows |= is_seen[i];
      }
    }
    hides = __any_sync(0xffffffffu, hides);
    shows = __any_sync(0xffffffffu, shows);
    if (lane == 0) seen[0] = !hides ? kNoColumn : shows ? kSomeColumns : kEveryColumn;
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
