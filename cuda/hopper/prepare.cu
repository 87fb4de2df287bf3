// What sums of dQ need before tiles add to them (sums.cuh): zeros, and how large dQ can be.
//
// The latter follows from the largest magnitudes of the keys and values that queries may see
// (sums/units.cuh). They are those of cells of queries, boxes whose lengths are powers of two: a
// block looks at the keys of such a cell, and tells all cells of queries that may see one. Of a key
// or value that is not finite it tells all queries of all boxes that its tile loads, also where a
// warpgroup passes over one of them: dQ of these will be NaN.
//
// blockIdx.x: a share of the sums and, below the number of cells, a cell of keys of one batch and
// key head.
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/hidden.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct PrepareArguments : HiddenKeys<Plan> {
  View<const typename Plan::Element, Plan::kRank> key, value;
  // [batch, key heads, cells of queries] {of keys, of values} as words; 0 before the launch
  uint2* magnitudes;
  long long shift[Plan::kRank];  // cells are 2^shift tokens long, along each axis
  long long cells;               // of keys, of all heads and batch entries
  int4* sums;
  long long size;  // of the sums
};

// The largest magnitudes of `dim` elements from `vector` on, of which this lane looks at 8.
template <typename Element>
__device__ void look_at(const Element* vector, int dim, unsigned& most) {
  const int first = threadIdx.x % 16 * 8;
  if (first >= dim) return;
  const uint4 words = *reinterpret_cast<const uint4*>(vector + first);
  const unsigned pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (unsigned pair : pairs) most = __vmaxu2(most, pair & 0x7fff7fffu);
}

// The largest magnitude that any thread of the block has found, as a word: that of NaN is the
// largest.
template <typename Element>
__device__ unsigned largest_of_block(unsigned pair) {
  __shared__ unsigned of_warp[8];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    pair = __vmaxu2(pair, __shfl_xor_sync(0xffffffffu, pair, distance));
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = pair;
  __syncthreads();
  for (int i = 0; i < 8; ++i) pair = __vmaxu2(pair, of_warp[i]);
  const float2 both = unpack(pair, Element());
  return max(__float_as_uint(both.x), __float_as_uint(both.y));
}

template <typename Plan>
__global__ void __launch_bounds__(256)
    prepare(const HopperProblem<Plan::kRank> problem, const PrepareArguments<Plan> arguments) {
  constexpr int kRank = Plan::kRank;
  using Element = typename Plan::Element;
  for (long long i = blockIdx.x * 256ll + threadIdx.x; i < arguments.size; i += gridDim.x * 256ll)
    arguments.sums[i] = make_int4(0, 0, 0, 0);
  if (blockIdx.x >= arguments.cells) return;

  int begin[kRank], extent[kRank], tokens = 1;
  unsigned rest = blockIdx.x;
#pragma unroll
  for (int r = kRank - 1; r >= 0; --r) {
    const int length = problem.axes[r].key_length, shift = arguments.shift[r];
    const int cells = ((length - 1) >> shift) + 1;
    begin[r] = rest % cells << shift;
    extent[r] = smaller(1 << shift, length - begin[r]);
    tokens *= extent[r];
    rest /= cells;
  }
  const int batch = rest / problem.head_groups.divisor, head = rest % problem.head_groups.divisor;
  unsigned key = 0, value = 0;
#pragma unroll 4
  for (int i = threadIdx.x / 16; i < tokens; i += 16) {  // 16 lanes look at a token
    int token[kRank], inside = i;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      token[r] = begin[r] + inside % extent[r];
      inside /= extent[r];
    }
    if (arguments.hides(batch, token)) continue;
    look_at(arguments.key.at(batch, token, head), problem.head_dim, key);
    look_at(arguments.value.at(batch, token, head), problem.value_dim, value);
  }
  uint2 largest = {largest_of_block<Element>(key), largest_of_block<Element>(value)};
  constexpr unsigned kInfinity = 0x7f800000;
  const bool is_finite = largest.x < kInfinity && largest.y < kInfinity;
  if (!is_finite) largest = {~0u >> 1, ~0u >> 1};  // NaN

  int first[kRank], count[kRank], cells[kRank], total = 1;  // cells of the queries to be told
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const int shift = arguments.shift[r];
    int low = begin[r], high = begin[r] + extent[r] - 1;  // keys, and then queries that see one
    if (!is_finite) {  // those of whole tiles: 0 * NaN is NaN, of which no integer tells
      const int size = problem.tile_box[r];
      low -= low % size;
      high = smaller(high - high % size + size, axis.key_length) - 1;
    }
    low = axis.inverse(low, 0).begin;
    high = axis.inverse(high, 0).end - 1;
    if (!is_finite) {
      low = larger(low - (kGranule - 1), 0);
      high = smaller(high + problem.column_box[r], axis.length) - 1;
    }
    cells[r] = ((axis.length - 1) >> shift) + 1;
    first[r] = low >> shift;
    count[r] = low <= high ? (high >> shift) + 1 - first[r] : 0;
    total *= count[r];
  }
  for (int i = threadIdx.x; i < total; i += blockDim.x) {
    unsigned place = 0, stride = 1;
    int inside = i;
#pragma unroll
    for (int r = kRank - 1; r >= 0; --r) {
      place += (first[r] + inside % count[r]) * stride;
      stride *= cells[r];
      inside /= count[r];
    }
    uint2* mine = arguments.magnitudes + rest * stride + place;
    atomicMax(&mine->x, largest.x);
    atomicMax(&mine->y, largest.y);
  }
}

}  // namespace cuneigh::hopper
