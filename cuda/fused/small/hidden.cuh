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

// What a thread knows of the columns of a stage, if they are masked: which of its own may be seen.
// `read` begins to load that, with the stage; `wait` comes when the stage has arrived.
template <typename Plan, bool kMasked = kMaskedColumns<Plan>>
struct SeenColumns {
  template <typename Smem>
  __device__ void read(const bool*, const Smem&) {}
  // Waits for all threads of the block. Whether columns are hidden.
  template <typename Smem>
  __device__ bool wait(Smem&, int) {
    __syncthreads();
    return false;
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
  __device__ bool wait(Smem& smem, int buffer) {
    bool hides = false;
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) hides |= !seen[i];
    if (!__syncthreads_or(hides)) return false;
    constexpr int kChunks = (Plan::kHeadDim + Plan::kValueDim) / 8;
    unsigned hidden = 0;
#pragma unroll
    for (int i = 0; i < kColumnsOfThread; ++i) hidden |= !seen[i] << i;
#pragma unroll 1
    for (int column = forgotten(threadIdx.x); column < kColumnsOfThread * kThreads;
         column += kThreads) {
      const unsigned word = __ballot_sync(0xffffffffu, hidden & 1);
      if (column % 32 == 0) words()[column / 32] = ~word;
      if (hidden & 1) {
        const unsigned address =
            smem.stage_address(buffer) + smem.column_offsets()[column].in_stage;
#pragma unroll 1
        for (int chunk = 0; chunk < kChunks; ++chunk)
          *static_cast<uint4*>(__cvta_shared_to_generic(chunk_address(address, chunk))) = {};
      }
      hidden >>= 1;
    }
    __syncthreads();
    return true;
  }

  // The lane's bits of the columns of a tile that may be seen; `first` is what SmallSmem::tile
  // says.
  __device__ LaneBits<Plan> of_tile(const SmallTables<Plan>& tables, unsigned first,
                                    int lane) const {
    LaneBits<Plan> bits = 0;
#pragma unroll 1
    for (int t = 0; t < Plan::kColumns / 4; ++t) {
      const int slot = t / 2 * 8 + lane % 4 * 2 + t % 2;
      const int column = (first + tables.tile_offset[slot]) / kColumnBytes<Plan>;
      bits |= LaneBits<Plan>(words()[column / 32] >> column % 32 & 1) << t;
    }
    return bits;
  }
};

// Where the mask is for the rows of a block, if they are keys and masked.
template <typename Plan, bool kMasked = Plan::kKeyMask && Plan::kRowsAreKeys>
struct RowMask {
  __device__ void fill(const KeyMask<Plan>&, int, const int (&)[Plan::kRank]) {}
  __device__ void begin(const KeyMask<Plan>&, int) {}
  __device__ bool hides(int, int) const { return false; }
};
template <typename Plan>
struct RowMask<Plan, true> {
  Origin<const bool> mask;
  unsigned mask_offset[SmallTables<Plan>::kRows];

  __device__ void fill(const KeyMask<Plan>& given, int row, const int (&token)[Plan::kRank]) {
    mask_offset[row] = offset_of(given.key_mask, token);
  }
  __device__ void begin(const KeyMask<Plan>& given, int head) {
    mask = origin_of_rows(given.key_mask, head);
  }
  __device__ bool hides(int row, int batch) const {
    return !*offset_by(in_batch(mask, batch), mask_offset[row]);
  }
};

}  // namespace cuneigh::fused::small
