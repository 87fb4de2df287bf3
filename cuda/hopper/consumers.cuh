// What consumers of all kernels do: wait for tiles and boxes, and hide what is not visible.
#pragma once

#include "hopper/products.cuh"
#include "hopper/results.cuh"
#include "hopper/shared.cuh"

namespace cuneigh::hopper {

// A consumer: thread number `thread` of warpgroup `w`, which holds the rows `row` and `row + 8` of
// its box.
template <typename Plan>
struct Consumer {
  SharedMemory<Plan>& smem;
  const int w;
  int thread = threadIdx.x % 128;
  Ring<2> tiles;
  Ring<Plan::kRowSlots> rows;
  Ring<Plan::kStages> boxes;
  int left = 0;  // boxes of the tile, from the current one on

  __device__ Consumer(SharedMemory<Plan>& smem, int w) : smem(smem), w(w) {
    // From a shuffle, since the assembler would read threadIdx again in each box: while products
    // read shared memory, that takes hundreds of cycles
    if (Plan::kSums) thread = __shfl_sync(0xffffffffu, thread, thread % 32);
    rows.advance(w);
  }

  __device__ int quad() const { return thread % 4; }
  __device__ int row() const { return thread / 32 * 16 + thread % 32 / 4; }

  __device__ const Tile<Plan::kRank>& tile() const { return smem.tile[tiles.slot()]; }

  // Where the rows of the other warpgroup are, if there are two.
  __device__ Ring<Plan::kRowSlots> others() const {
    static_assert(Plan::kWarpgroups == 2 && Ring<Plan::kRowSlots>::kPowerOfTwo, "slots are pairs");
    return {rows.position ^ 1};
  }

  // Waits for the rows of the next tile, if kSums for those of all warpgroups; false if there is
  // none.
  __device__ bool begin_tile() {
    smem.tile_full[tiles.slot()].wait(tiles.parity());
    left = tile().boxes;
    if (left == kNoTile) return false;
    smem.row_full[rows.slot()].wait(rows.parity());
    if constexpr (Plan::kSums) smem.row_full[others().slot()].wait(others().parity());
    return true;
  }
  __device__ void release_rows() {
    smem.row_empty[rows.slot()].arrive_as_warp();
    if constexpr (Plan::kSums) smem.row_empty[others().slot()].arrive_as_warp();
    rows.advance(Plan::kWarpgroups);
  }
  __device__ void end_tile() {
    smem.tile_empty[tiles.slot()].arrive_as_warp();
    tiles.advance();
  }

  // Waits for the next box of columns of which this warpgroup sees any, its vo not included; false
  // if there is none. (In the caller's loop, with a `continue` for a box that is passed over, the
  // compiler would have two versions of the sums, and serialize the products.)
  __device__ bool begin_box() {
    for (; left > 0; pass_over())
      if (sees_box()) return true;
    return false;
  }
  // The same with a call for every box that is about to be passed over. `visibility` is that of the
  // current box, or kNone if there is none; returned is that of the box that is not passed over.
  template <typename Pass>
  __device__ int begin_box(int visibility, Pass pass) {
    while (left > 0 && visibility == kNone) {
      pass();
      pass_over();
      visibility = left > 0 ? look_at(boxes) : kNone;
    }
    return visibility;
  }
  // Waits for a box, and says what this warpgroup sees of it.
  __device__ int look_at(Ring<Plan::kStages> box) const {
    smem.qk_full[box.slot()].wait(box.parity());
    return smem.visibility[box.slot()][w];
  }
  // The same of the next box, kNone if there is none. To be called while products are made: while
  // they read shared memory, it takes hundreds of cycles.
  __device__ int look_ahead() const {
    static_assert(Plan::kStages > 1, "the next box is awaited while this one is held");
    Ring<Plan::kStages> next = boxes;
    next.advance();
    return left > 1 ? look_at(next) : kNone;
  }
  // The same beside a box that this warpgroup still holds, whose place is `held`. False also if
  // that place comes next: what is loaded there would wait for this warpgroup.
  __device__ bool begin_box_beside(Ring<Plan::kStages> held) {
    for (; left > 0 && boxes.slot() != held.slot(); pass_over())
      if (sees_box()) return true;
    return false;
  }
  __device__ bool sees_box() const {
    smem.qk_full[boxes.slot()].wait(boxes.parity());
    return visibility() != kNone;
  }
  // Of the current box. To be called early, if there is a register for it: while products read
  // shared memory, it takes hundreds of cycles.
  __device__ int visibility() const { return smem.visibility[boxes.slot()][w]; }
  __device__ void pass_over() {
    wait_for_vo();
    release_qk();
    release_vo();
    end_box();
  }
  __device__ void wait_for_vo() const { smem.vo_full[boxes.slot()].wait(boxes.parity()); }
  __device__ void release_qk() const { release_qk(boxes); }
  __device__ void release_vo() const { release_vo(boxes); }
  __device__ void release_qk(Ring<Plan::kStages> box) const {
    smem.qk_empty[box.slot()].arrive_as_warp();
  }
  __device__ void release_vo(Ring<Plan::kStages> box) const {
    smem.vo_empty[box.slot()].arrive_as_warp();
  }
  __device__ void end_box() {
    --left;
    boxes.advance();
  }

  // The numbers of the coordinates of the row `row` or `row + 8` (mask.cuh), and what a row with
  // these numbers sees of the current box, which is partial, along each axis.
  __device__ unsigned numbers(int half) const {
    return smem.mask.numbers(smem.problem, w, row() + 8 * half);
  }
  __device__ void read(unsigned numbers, unsigned (&word)[Plan::kRank]) const {
    smem.mask.read(boxes.slot(), numbers, quad(), word);
  }

  // Whether a mask hides that row, which counts in sums of columns.
  __device__ bool is_hidden(int half) const {
    return smem.mask.hidden[tiles.slot()].hides(w * kRows + row() + 8 * half);
  }

  // Reads which columns of the current box the rows `row` and `row + 8` see, unless they see all of
  // them. To be called while S is made: while products read shared memory, it takes hundreds of
  // cycles.
  __device__ void look(int visibility, unsigned (&word)[2]) const {
    if (sees_all(visibility)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) word[half] = seen_by(half, visibility);
  }
  // Hides the logits S [64, kColumns] of pairs that are not visible.
  template <int kTiles>
  __device__ void hide_invisible(float (&logit)[kTiles][4], int visibility,
                                 const unsigned (&word)[2]) const {
    if (sees_all(visibility)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) hide(logit, half, word[half]);
  }
  // The same where there is no register for a look.
  template <int kTiles>
  __device__ void hide_invisible(float (&logit)[kTiles][4], int visibility) const {
    if (sees_all(visibility)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) hide(logit, half, seen_by(half, visibility));
  }
  __device__ bool sees_all(int visibility) const {
    return kMaskedColumns<Plan> ? visibility == kAll : visibility != kPartial;
  }
  // What one of the rows sees of a box of which they do not see all.
  __device__ unsigned seen_by(int half, int visibility) const {
    unsigned word = ~0u;
    if constexpr (kMaskedColumns<Plan>)
      if (visibility >= kPartialHoles) word = smem.mask.seen(boxes.slot()).word[quad()];
    if (kMaskedColumns<Plan> && visibility == kHoles) return word;
    unsigned along[Plan::kRank];
    read(numbers(half), along);
#pragma unroll
    for (unsigned each : along) word &= each;
    return word;
  }
};

template <int kTiles>
__device__ void multiply_by(float (&logit)[kTiles][4], float factor) {
#pragma unroll
  for (auto& tile : logit)
#pragma unroll
    for (float& x : tile) x *= factor;
}

}  // namespace cuneigh::hopper
