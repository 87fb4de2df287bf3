// Neighborhood attention in one pass on tensor cores (after FlashAttention-2): a block takes a box
// of queries, walks over the boxes of keys that cover the union of their windows, and keeps a
// running softmax. Each warp skips a box of keys that none of its queries sees, and masks only one
// that some of them do not see whole.
//
// blockIdx.x: (batch, head, query box).
//
// struct Plan {
//   static constexpr int kRank;                  token axes
//   static constexpr int kWarps, kRowTiles;      warps of a block; each takes kRowTiles * 16
//   queries static constexpr int kKeys;                  keys of a box, a multiple of 16 up to 64
//   static constexpr int kHeadDim, kValueDim;    head dimensions, padded to multiples of 16
//   static constexpr int kKeyBytes, kValueBytes; widths of the loads that the alignment allows
//   static constexpr int kSharedBytes;           of FusedSmem, as the launcher counts them
//   using Element;                               float16 or bfloat16
//   using Bias;                                  dtype of rpb, or void when there is none
// };

#include "cuneigh/async.cuh"
#include "cuneigh/boxes.cuh"
#include "cuneigh/fused.cuh"
#include "cuneigh/mma.cuh"

namespace cuneigh {

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32)
    fused_forward(const FusedProblem<Plan::kRank> problem, const FusedForward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kRank = Plan::kRank;
  constexpr int kRowTiles = Plan::kRowTiles;
  constexpr int kKeyTiles = Plan::kKeys / 8;
  constexpr bool kHasBias = !kSame<typename Plan::Bias, void>;
  static_assert(sizeof(FusedSmem<Plan>) == Plan::kSharedBytes,
                "`shared_memory` in cuneigh/_backends/fused.py counts what FusedSmem holds");
  extern __shared__ __align__(16) char memory_smem[];
  auto& smem = *reinterpret_cast<FusedSmem<Plan>*>(memory_smem);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const QueryBox<kRank> box = query_box(problem);
  const int kv_head = box.head / problem.group_size;

  // Tables: the token and the window of every query, the place of every key in its box, and the
  // keys that lie before a coordinate along an axis, as bits
  Range reach[kRank];
  int key_boxes[kRank], tiles = 1;
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    reach[r] = reach_of(problem, box, r);
    key_boxes[r] = ceil_div(reach[r].end - reach[r].begin, problem.key_box[r]);
    tiles *= key_boxes[r];
  }
  fill_tables<Plan>(problem, arguments, box, smem);
  __syncthreads();

  // After the boxes of the window come those of the additional keys
  const int all_tiles = tiles + ceil_div(problem.additional, Plan::kKeys);
  auto load = [&](int tile) {
    const KeyBox<kRank> keys = key_box<Plan>(problem, reach, key_boxes, tile, tiles, smem);
    load_keys<Plan::kHeadDim, Plan::kKeyBytes, &KeyPlace<kRank>::key>(
        problem, keys, arguments.key, arguments.additional_keys, problem.head_dim, box, kv_head,
        smem, smem.key[tile % 2]);
    load_keys<Plan::kValueDim, Plan::kValueBytes, &KeyPlace<kRank>::value>(
        problem, keys, arguments.value, arguments.additional_values, problem.value_dim, box,
        kv_head, smem, smem.value[tile % 2]);
    cp_async_commit();
  };
  load_queries<Plan>(problem, arguments.query, box, smem);
  load(0);

  // What this warp's queries see
  Sight sight[kRank];
#pragma unroll
  for (int r = 0; r < kRank; ++r) {
    sight[r] = Sight::nothing();
    for (int row = lane; row < 16 * kRowTiles; row += 32)
      if (smem.query_token[warp * 16 * kRowTiles + row][0] >= 0)
        sight[r].add(smem.window[warp * 16 * kRowTiles + row][r]);
    sight[r] = sight[r].of_warp();
  }

  // Rows lane / 4 and lane / 4 + 8 of every 16 are this thread's, in columns 2 * (lane % 4) + {0,
  // 1} of every 8 keys or dimensions
  const int first_row = warp * 16 * kRowTiles + lane / 4;
  float output_rmem[kRowTiles][Plan::kValueDim / 8][4] = {};
  float maximum[kRowTiles][2], sum[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) maximum[m][half] = -infinity<float>(), sum[m][half] = 0;
  const float scale = problem.scale * 1.44269504f;  // logits in base 2

  for (int tile = 0; tile < all_tiles; ++tile) {
    // This box has arrived, and everyone is done with the one before, whose memory the next takes
    cp_async_wait<0>();
    __syncthreads();
    if (tile == 0) sign_queries<Plan>(problem, smem, warp, lane);
    if (tile + 1 < all_tiles) load(tile + 1);

    const KeyBox<kRank> keys = key_box<Plan>(problem, reach, key_boxes, tile, tiles, smem);
    const Visibility visibility = visibility_of<Plan>(problem, keys, sight);
    if (visibility == Visibility::kNone) continue;
    float logit_rmem[kRowTiles][kKeyTiles][4] = {};
    // S = Q K^T
#pragma unroll
    for (int d = 0; d < Plan::kHeadDim; d += 16) {
      unsigned query_rmem[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        ldmatrix_x4(query_rmem[m],
                    shared_address(
                        &smem.query[(warp * kRowTiles + m) * 16 + lane % 16][d + lane / 16 * 8]));
#pragma unroll
      for (int n = 0; n < Plan::kKeys; n += 16) {
        unsigned key_rmem[4];
        ldmatrix_x4(key_rmem,
                    shared_address(
                        &smem.key[tile % 2][n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_m16n8k16(logit_rmem[m][n / 8], query_rmem[m], key_rmem[0], key_rmem[1], Element());
          mma_m16n8k16(logit_rmem[m][n / 8 + 1], query_rmem[m], key_rmem[2], key_rmem[3],
                       Element());
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + m * 16 + half * 8;
        // Bias and mask
        unsigned long long visible = ~0ull;
        if (visibility == Visibility::kSome)
          visible = visible_keys<Plan>(problem, keys, smem, row, lane);
        if constexpr (kHasBias)
          add_bias<Plan>(problem, arguments.rpb, box, keys, smem, row, half, lane, scale, visible,
                         logit_rmem[m]);
        if (visibility == Visibility::kSome) {
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (!(visible >> (n * 8 + i) & 1))
                logit_rmem[m][n][2 * half + i] = -infinity<float>();
        }

        // Running softmax of one row, which four lanes share
        const float factor = kHasBias ? 1.0f : scale;
        float next = logit_rmem[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) next = fmaxf(next, logit_rmem[m][n][2 * half + i]);
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 1));
        next = fmaxf(next, __shfl_xor_sync(0xffffffffu, next, 2));
        next = fmaxf(maximum[m][half], next * factor);
        const float shift = next == -infinity<float>() ? 0.0f : next;
        const float decay = ex2_approx(maximum[m][half] - shift);
        maximum[m][half] = next;
        sum[m][half] *= decay;
        // The maximum seldom moves after the first boxes
        if (__any_sync(0xffffffffu, decay != 1.0f)) {
#pragma unroll
          for (int d = 0; d < Plan::kValueDim / 8; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) output_rmem[m][d][2 * half + i] *= decay;
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& weight = logit_rmem[m][n][2 * half + i];
            weight = ex2_approx(fmaf(weight, factor, -shift));
            sum[m][half] += weight;
          }
      }
    }

    // O += P V
#pragma unroll
    for (int n = 0; n < Plan::kKeys; n += 16) {
      unsigned weight_rmem[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const auto& left = logit_rmem[m][n / 8];
        const auto& right = logit_rmem[m][n / 8 + 1];
        weight_rmem[m][0] = pack(left[0], left[1], Element());
        weight_rmem[m][1] = pack(left[2], left[3], Element());
        weight_rmem[m][2] = pack(right[0], right[1], Element());
        weight_rmem[m][3] = pack(right[2], right[3], Element());
      }
#pragma unroll
      for (int d = 0; d < Plan::kValueDim; d += 16) {
        unsigned value_rmem[4];
        ldmatrix_x4_trans(value_rmem,
                          shared_address(&smem.value[tile % 2][n + lane % 16][d + lane / 16 * 8]));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_m16n8k16(output_rmem[m][d / 8], weight_rmem[m], value_rmem[0], value_rmem[1],
                       Element());
          mma_m16n8k16(output_rmem[m][d / 8 + 1], weight_rmem[m], value_rmem[2], value_rmem[3],
                       Element());
        }
      }
    }
  }

  // Normalize, and write each warp's rows through its part of the queries' memory
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8;
      float total = sum[m][half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float normalizer = total == 0 ? 0.0f : 1 / total;
#pragma unroll
      for (int d = 0; d < Plan::kValueDim / 8; ++d)
        *reinterpret_cast<unsigned*>(&smem.query[row][d * 8 + lane % 4 * 2]) =
            pack(output_rmem[m][d][2 * half] * normalizer,
                 output_rmem[m][d][2 * half + 1] * normalizer, Element());
      const auto& token = smem.query_token[row];
      if (arguments.lse.data && lane % 4 == 0 && token[0] >= 0)
        *arguments.lse.at(box.batch, token, box.head) =
            total == 0 ? -infinity<float>() : maximum[m][half] * 0.693147181f + logf(total);
    }
  }
  __syncwarp();
  store_rows<Plan>(problem, arguments.output, box, smem, warp, lane);
}

}  // namespace cuneigh
