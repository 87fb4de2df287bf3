// From the dense products of tiles to weights: S = scale Q K^T + bias, P = softmax(S) over the keys
// that each row sees, and zeros for the others. Rows that stand for no query become zeros. Weights
// may take the place of the products.
//
// blockIdx.x: a tile and a slice of its rows. A team of Plan::kLanes lanes takes a row, of which a
// lane holds Plan::kPackets packets. If that is 0, the row is too long, and is read twice.

#include "cuneigh/softmax.cuh"
#include "gemm/rows.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct SoftmaxArguments {
  BiasView<Plan> rpb;    // [heads, 2 K - 1, ..], or null
  NumberView<Plan> lse;  // [batch, x1..xr, heads], or null
  // [tiles, rows, columns] each, one array if they are of one type
  const Accumulator<typename Plan::Element>* products;
  typename Plan::Element* weights;
  long long slices;
};

// Sums and maxima over the lanes of a team: a part of a warp, or the whole block.
template <int kLanes, int kThreads, typename Number, typename Combine>
__device__ Number over_team(Number x, Combine combine) {
  constexpr int kInWarp = kLanes < 32 ? kLanes : 32;
  const unsigned first = threadIdx.x % 32 / kInWarp * kInWarp;
  const unsigned mask = (0xffffffffu >> (32 - kInWarp)) << first;
#pragma unroll
  for (int distance = kInWarp / 2; distance > 0; distance /= 2)
    x = combine(x, __shfl_xor_sync(mask, x, distance));
  if constexpr (kLanes > 32) {
    static_assert(kLanes == kThreads, "a team of more than a warp is the whole block");
    __shared__ Number warp_smem[kThreads / 32];  // [warps]
    __syncthreads();                             // the previous use has been read
    if (threadIdx.x % 32 == 0) warp_smem[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_smem[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) x = combine(x, warp_smem[warp]);
  }
  return x;
}

template <int kLanes, int kThreads, typename Number>
__device__ Number team_maximum(Number x) {
  return over_team<kLanes, kThreads>(x, [](Number a, Number b) { return a > b ? a : b; });
}

template <int kLanes, int kThreads, typename Number>
__device__ Number team_sum(Number x) {
  return over_team<kLanes, kThreads>(x, [](Number a, Number b) { return a + b; });
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    softmax(const Tiles<Plan::kRank> tiles, const SoftmaxArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kVector = 16 / sizeof(Number);
  constexpr int kStep = Plan::kLanes * kVector;  // columns of one packet of every lane
  constexpr int kHeld = Plan::kPackets ? Plan::kPackets : 1;
  using Logits = Packet<Number, kVector>;
  using Weights = Packet<Element, kVector>;

  const int keys = volume(tiles.halo);
  const Extents<Plan::kRank> halo(tiles.halo);
  const Number scale = Number(tiles.problem.scale);

  for_each_row<Plan>(
      tiles, arguments.slices,
      [&](const Tile<Plan::kRank>& tile, const TileRow<Plan::kRank>& row, long long start) {
        constexpr bool kBiased = !kSame<typename Plan::Bias, void>;
        Element* target = arguments.weights + start;
        const Number* source;
        if constexpr (kSame<Element, Number>)
          source = target;  // the weights take the place of the products
        else
          source = arguments.products + start;

        // S = scale Q K^T + bias, -inf where the row does not see the key
        auto finish = [&](int column, unsigned seen, Number(&logit)[kVector]) {
          if constexpr (kBiased) {
            Number bias[kVector];
            load_bias<Plan>(halo, row, column, keys, seen, arguments.rpb, bias);
#pragma unroll
            for (int i = 0; i < kVector; ++i) logit[i] = scale * logit[i] + bias[i];
          } else {
#pragma unroll
            for (int i = 0; i < kVector; ++i) logit[i] *= scale;
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            if (!(seen >> i & 1)) logit[i] = -infinity<Number>();
        };
        auto load = [&](int column, Number(&product)[kVector]) {
          const Logits packet = *reinterpret_cast<const Logits*>(source + column);
#pragma unroll
          for (int i = 0; i < kVector; ++i) product[i] = packet.element[i];
        };
        auto store = [&](int column, const Number(&weight)[kVector], Number factor) {
          Weights packet;
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            packet.element[i] = convert<Element>(weight[i] * factor);
          *reinterpret_cast<Weights*>(target + column) = packet;
        };
        const int first = Lanes::lane() * kVector;
        Softmax<Number> softmax;

        if constexpr (Plan::kPackets > 0) {
          // All loads are in flight together; packets of which nothing is seen are not read.
          Number held[kHeld][kVector];  // S, then P
          unsigned seen[kHeld];
#pragma unroll
          for (int p = 0; p < kHeld; ++p) {
            const int column = first + p * kStep;
            seen[p] = 0;
            if (column < tiles.columns)
              seen[p] = seen_keys<kVector>(tiles, halo, row, column, keys);
            if (seen[p]) load(column, held[p]);
          }
#pragma unroll
          for (int p = 0; p < kHeld; ++p) {
            finish(first + p * kStep, seen[p], held[p]);
            softmax.row_max = softmax.max_with(held[p]);
          }
          // P = exp(S - max(S)) / sum(P), stored times a factor
          softmax.row_max = team_maximum<Plan::kLanes, Plan::kThreads>(softmax.row_max);
#pragma unroll
          for (int p = 0; p < kHeld; ++p) softmax.exponentiate(held[p]);
          softmax.row_sum = team_sum<Plan::kLanes, Plan::kThreads>(softmax.row_sum);
          const Number factor = softmax.normalizer(Number(weight_factor<Element>()));
#pragma unroll
          for (int p = 0; p < kHeld; ++p)
            if (first + p * kStep < tiles.columns) store(first + p * kStep, held[p], factor);
        } else {
          auto logits_at = [&](int column, Number(&logit)[kVector]) {
            const unsigned seen = seen_keys<kVector>(tiles, halo, row, column, keys);
            if (seen) load(column, logit);
            finish(column, seen, logit);
          };
          for (int column = first; column < tiles.columns; column += kStep) {
            Number logit[kVector];
            logits_at(column, logit);
            softmax.update(logit);
          }
          softmax.rescale(team_maximum<Plan::kLanes, Plan::kThreads>(softmax.row_max));
          softmax.row_sum = team_sum<Plan::kLanes, Plan::kThreads>(softmax.row_sum);
          const Number factor = softmax.normalizer(Number(weight_factor<Element>()));
          const Number subtracted = softmax.finite(softmax.row_max);
          for (int column = first; column < tiles.columns; column += kStep) {
            Number weight[kVector];
            logits_at(column, weight);
#pragma unroll
            for (int i = 0; i < kVector; ++i) weight[i] = exponential(weight[i] - subtracted);
            store(column, weight, factor);
          }
        }
        if (arguments.lse.data && row.exists && Lanes::lane() == 0)
          *arguments.lse.at(tile.batch, row.token, row.head) = softmax.lse();
      });
}

}  // namespace cuneigh::gemm
