// From the weights P of tiles and the dense products of tangents to the tangents of weights:
// dS = scale (dQ K^T + Q dK^T) + dbias, dlse = sum(P dS), dP = P (dS - dlse). They may take the
// place of the products. Where a row does not see a key, P is 0.
//
// blockIdx.x: a tile and a slice of its rows. A team of Plan::kLanes lanes takes a row.

#include "gemm/rows.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct TangentArguments {
  BiasView<Plan> tangent_rpb;    // [heads, 2 K - 1, ..], or null
  NumberView<Plan> tangent_lse;  // [batch, x1..xr, heads], or null
  // [tiles, rows, columns] each; the last two are one array if they are of one type
  const typename Plan::Element* weights;
  const Accumulator<typename Plan::Element>* products;
  typename Plan::Element* tangents;
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    tangent(const Tiles<Plan::kRank> tiles, const TangentArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kVector = 16 / sizeof(Number);
  using Numbers = Packet<Number, kVector>;
  using Elements = Packet<Element, kVector>;

  const int keys = volume(tiles.halo);
  const Extents<Plan::kRank> halo(tiles.halo);
  const Number scale = Number(tiles.problem.scale);
  const Number* products;
  if constexpr (kSame<Element, Number>)
    products = arguments.tangents;
  else
    products = arguments.products;

  for_each_row<Plan>(
      tiles, arguments.slices,
      [&](const Tile<Plan::kRank>& tile, const TileRow<Plan::kRank>& row, long long start) {
        // P and dS of some columns
        auto load = [&](int column, Number(&weight)[kVector], Number(&moved)[kVector]) {
          const unsigned seen = seen_keys<kVector>(tiles, halo, row, column, keys);
          Number bias[kVector];
          load_bias<Plan>(halo, row, column, keys, seen, arguments.tangent_rpb, bias);
          Elements weights;
          Numbers product;
          if (seen) {
            weights = *reinterpret_cast<const Elements*>(arguments.weights + start + column);
            product = *reinterpret_cast<const Numbers*>(products + start + column);
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            weight[i] = moved[i] = 0;
            if (seen >> i & 1) {
              weight[i] = convert<Number>(weights.element[i]) / Number(weight_factor<Element>());
              moved[i] = scale * product.element[i] + bias[i];
            }
            if (weight[i] == 0) moved[i] = 0;  // it counts nothing, whatever it is
          }
        };
        const int first = Lanes::lane() * kVector;
        Number weight[kVector], moved[kVector], sum = 0;
        for (int column = first; column < tiles.columns; column += Plan::kLanes * kVector) {
          load(column, weight, moved);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum += weight[i] * moved[i];
        }
        sum = Lanes::sum(sum);
        for (int column = first; column < tiles.columns; column += Plan::kLanes * kVector) {
          load(column, weight, moved);
          Elements tangents;
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            tangents.element[i] = convert<Element>(weight[i] * (moved[i] - sum));
          *reinterpret_cast<Elements*>(arguments.tangents + start + column) = tangents;
        }
        if (arguments.tangent_lse.data && row.exists && Lanes::lane() == 0)
          *arguments.tangent_lse.at(tile.batch, row.token, row.head) = sum;
      });
}

}  // namespace cuneigh::gemm
