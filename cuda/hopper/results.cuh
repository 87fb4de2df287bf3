// How consumers write rows of results.
#pragma once

#include "hopper/tile.cuh"
#include "hopper/wgmma.cuh"

namespace cuneigh::hopper {

// Writes four matrices of 8 x 8 elements, whose fragments `word` are, to shared memory: lanes 8 m
// to 8 m + 7 say where the rows of matrix m go.
__device__ inline void store_matrices(unsigned address, const unsigned (&word)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

// The token of a row of warpgroup `w`. False if the row does not exist: the warpgroup takes no part
// in the tile, or an axis ends before the row.
template <typename Plan>
__device__ bool token_of_row(const HopperProblem<Plan::kRank>& problem,
                             const Tile<Plan::kRank>& tile, int w, int row,
                             int (&token)[Plan::kRank]) {
  bool exists = tile.active >> w & 1;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const int inside = row % problem.row_box[r];
    row /= problem.row_box[r];
    const int first = tile.first[r].index + problem.warpgroup[w][1 + r];
    const GroupIndex position = {tile.first[r].group, first + inside};
    exists &= position.index < rows_of_group<Plan>(axis, position.group);
    token[r] = axis.token(position);
  }
  return exists;
}

// Writes 16 bytes, or nothing. Without a branch: between branches the assembler would use the same
// four registers for one store after the other, and each would wait until the last one is read.
__device__ inline void store_if(bool exists, void* target, const unsigned (&word)[4]) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(
          unsigned(exists)),
      "l"(target), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
      : "memory");
}

// Writes one of the two rows that the lanes of a quad share, of a result [64, 8 kTiles] times
// `factor`, 16 bytes a lane: the first `dim` columns, if the row exists. Zeros if it is hidden.
template <typename Element, int kTiles>
__device__ void store_row(const float (&result)[kTiles][4], int half, float factor, int quad,
                          Element* row, int dim, bool exists, bool is_hidden = false) {
#pragma unroll
  for (int chunk = 0; chunk < kTiles; chunk += 4) {  // of 8 columns
    // Word i of this lane is columns 8 (chunk + i) + 2 quad and the next: 4 x 4 words are
    // transposed within the quad, so that this lane gets the four words of chunk + quad
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] = pack(result[chunk + i][2 * half] * factor, result[chunk + i][2 * half + 1] * factor,
                     Element());
    const bool odd = quad & 1, high = quad & 2;
    unsigned a = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
    unsigned b = __shfl_xor_sync(0xffffffffu, odd ? word[2] : word[3], 1);
    if (odd)
      word[0] = a, word[2] = b;
    else
      word[1] = a, word[3] = b;
    a = __shfl_xor_sync(0xffffffffu, high ? word[0] : word[2], 2);
    b = __shfl_xor_sync(0xffffffffu, high ? word[1] : word[3], 2);
    if (high)
      word[0] = a, word[1] = b;
    else
      word[2] = a, word[3] = b;
#pragma unroll
    for (unsigned& each : word) each = is_hidden ? 0 : each;
    const int column = 8 * (chunk + quad);
    store_if(exists && column < dim, row + column, word);
  }
}

// Writes the 16 rows that a warp has of a result [64, 8 kTiles] times `factor`: the first `dim`
// columns of those whose bit in `existing` is set, zeros if that in `hidden` is. They go through
// `buffer` in shared memory, which no other warp uses, so that lanes write whole lines. `row` is
// where row number lane % 16 of the warp begins.
template <typename Element, int kTiles>
__device__ void store_rows(const float (&result)[kTiles][4], float factor, int4 (*buffer)[16],
                           Element* row, int dim, unsigned existing, unsigned hidden) {
  static_assert(kTiles % 2 == 0 && kTiles <= 16, "tiles are written in pairs, into rows of 16");
  // 16-byte chunks of a row trade places such that those of 8 rows lie in different banks
  const int lane = threadIdx.x % 32, line = lane % 16;
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = result[n + i / 2] + 2 * (i % 2);
      word[i] = pack(pair[0] * factor, pair[1] * factor, Element());
    }
    store_matrices(shared_address(&buffer[line][(n + lane / 16) ^ line % 8]), word);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16; i += 2) {
    const int r = i + lane / 16, chunk = lane % 16;
    const int4 four = buffer[r][chunk ^ r % 8];
    const unsigned shown = hidden >> r & 1 ? 0 : ~0u;
    const auto target = __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), r);
    store_if(existing >> r & 1 && 8 * chunk < dim, reinterpret_cast<Element*>(target) + 8 * chunk,
             {four.x & shown, four.y & shown, four.z & shown, four.w & shown});
  }
  __syncwarp();  // before `buffer` is used again
}

}  // namespace cuneigh::hopper
