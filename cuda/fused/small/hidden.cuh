// Keys that a mask hides (cuneigh/key_mask.cuh), as columns and as rows.
//
// A hidden column has no weight, but what lies in its vectors, be it NaN, is multiplied by that: it
// is set to zero in shared memory. That happens only in stages that have hidden columns; of others
// no more is done than to look. Rows do not meet each other: hidden ones get zeros for gradients.
#pragma once

#include "cuneigh/key_mask.cuh"
#include "fused/small/smem.cuh"
#include "fused/thread.cuh"

namespace cuneigh::fused::small {

// Which columns of a stage are hidden.
enum Hidden : int { kNoColumn, kSomeColumns, kEveryColumn };

// What a thread knows of the columns of a stage, if they are masked: which of its own may be seen.
// `read` begins to load that, while the stage is on its way; `wait` comes when it has arrived.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct SeenColumns {
  template <typename Smem>
  __device__ void read(const bool*, const Smem&) {}
  // Waits for all threads of the block.
  template <typename Smem>
  __device__ Hidden wait(Smem&, int) {
    __syncthreads();
    return kNoColumn;
  }
  __device__ LaneBits<Plan> of_tile(const SmallTables<Plan>&, unsigned, int) const { return 0; }
};
template <typename Plan>
struct SeenColumns<Plan, true> {
  static constexpr int kThreads = Plan::kWarps * 32;
  bool seen[kColumnsOfThread];  // columns threadIdx.x + i * kThreads

  // A bit for each column of the stage at hand.
  __device__ static unsigned* words() {
    __shared__ unsigned words_smem[kColumnsOfThread * Plan::kWarps];
    return words_smem;
  }

  // `first` is where the mask is for the first column of the stage.
  template <typename Smem>
  __device__ void read(const bool* first, Smem& smem) {
    const int thread = forgotten(threadIdx.x);  // or its tables' addresses would be kept
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) {
      const int column = thread + i * kThreads;
      seen[i] = column >= smem.tables.stage_columns ||
                *offset_by(first, smem.column_offsets()[column].extra);
    }
  }

  template <typename Smem>
  __device__ Hidden wait(Smem& smem, int buffer) {
    unsigned hidden = 0;
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) hidden |= !seen[i] << i;
    if (!__syncthreads_or(hidden)) return kNoColumn;
    bool shows = false;
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i)
      shows |= seen[i] && threadIdx.x + i * kThreads < smem.tables.stage_columns;
    if (!__syncthreads_or(shows)) return kEveryColumn;
    constexpr int kChunks = (Plan::kHeadDim + Plan::kValueDim) / 8;
#pragma unroll 1
    for (int column = forgotten(threadIdx.x); column / 32 * 32 < smem.tables.stage_columns;
         column += kThreads) {
      const unsigned word = __ballot_sync(0xffffffffu, hidden & 1);
      if (column % 32 == 0) words()[column / 32] = ~word;
      if (hidden & 1) {
        const unsigned address =
            smem.stage_address(buffer) + smem.column_offsets()[column].in_stage;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
          *static_cast<uint4*>(__cvta_shared_to_generic(chunk_address(address, chunk))) = {};
      }
      hidden >>= 1;
    }
    __syncthreads();
    return kSomeColumns;
  }

  // The lane's bits of the columns of a tile that may be seen; `first` is what SmallSmem::tile
  // says.
  __device__ LaneBits<Plan> of_tile(const SmallTables<Plan>& tables, unsigned first,
                                    int lane) const {
    LaneBits<Plan> bits = 0;
#pragma unroll
    for (int n = 0; n < Plan::kColumns; n += 32) {
      const int slot = n + lane;
      bool is_seen = false;
      if (slot < Plan::kColumns) {
        const unsigned column = (first + tables.tile_offset[slot]) / kColumnBytes<Plan>;
        is_seen = words()[column / 32] >> column % 32 & 1;
      }
      // Of every eight of the 32 columns the lane has two
      unsigned mine = __ballot_sync(0xffffffffu, is_seen) >> lane % 4 * 2 & 0x03030303;
      mine = (mine | mine >> 6) & 0x000f000f;
      bits |= LaneBits<Plan>((mine | mine >> 12) & 0xff) << n / 4;
    }
    return bits;
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
