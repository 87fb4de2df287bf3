// From the dense products of tiles, Q K^T and dP = dO V^T, to P = exp(S - lse) and
// dS = P (dP - delta), with zeros for keys that a row does not see. What is written takes the place
// of what is read if both are of one type.
//
// blockIdx.x: a tile and a slice of its rows. A team of Plan::kLanes lanes takes a row. On the way
// it leaves delta = sum(dO * O) - grad_lse for the gradient of rpb.

#include "gemm/rows.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct GradientArguments {
  BiasView<Plan> rpb;                   // [heads, 2 K - 1, ..], or null
  ConstView<Plan> grad_output, output;  // [batch, x1..xr, heads, value_dim]
  ConstNumberView<Plan> lse, grad_lse;  // [batch, x1..xr, heads]; grad_lse or null
  NumberView<Plan> delta;               // [batch, x1..xr, heads], or null
  // [tiles, rows, columns] each: Q K^T, dP, P and dS
  const Accumulator<typename Plan::Element>* products;
  const Accumulator<typename Plan::Element>* grad_weights;
  typename Plan::Element* weights;
  typename Plan::Element* grad_logits;
  long long slices;
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    gradient(const Tiles<Plan::kRank> tiles, const GradientArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  constexpr int kVector = 16 / sizeof(Number);
  using Numbers = Packet<Number, kVector>;
  using Elements = Packet<Element, kVector>;

  const Problem<Plan::kRank>& problem = tiles.problem;
  const int keys = volume(tiles.halo);
  const Extents<Plan::kRank> halo(tiles.halo);
  const Number scale = Number(problem.scale);
  const Number *products, *grad_weights;
  if constexpr (kSame<Element, Number>) {
    products = arguments.weights;
    grad_weights = arguments.grad_logits;
  } else {
    products = arguments.products;
    grad_weights = arguments.grad_weights;
  }

  for_each_row<Plan>(
      tiles, arguments.slices,
      [&](const Tile<Plan::kRank>& tile, const TileRow<Plan::kRank>& row, long long start) {
        Number delta = 0, lse = 0;
        if (row.exists) {
          // delta = sum(dO * O) - grad_lse
          const Element* grad_output = arguments.grad_output.at(tile.batch, row.token, row.head);
          const Element* output = arguments.output.at(tile.batch, row.token, row.head);
          for (int i = Lanes::lane(); i < problem.value_dim; i += Plan::kLanes)
            delta += convert<Number>(grad_output[i]) * convert<Number>(output[i]);
          delta = Lanes::sum(delta);
          if (arguments.grad_lse.data)
            delta -= *arguments.grad_lse.at(tile.batch, row.token, row.head);
          if (arguments.delta.data && Lanes::lane() == 0)
            *arguments.delta.at(tile.batch, row.token, row.head) = delta;
          lse = *arguments.lse.at(tile.batch, row.token, row.head);
          if (lse == -infinity<Number>()) lse = infinity<Number>();  // all weights are 0
        }
#pragma unroll 2
        for (int column = Lanes::lane() * kVector; column < tiles.columns;
             column += Plan::kLanes * kVector) {
          const unsigned seen = seen_keys<kVector>(tiles, halo, row, column, keys);
          Number bias[kVector];
          load_bias<Plan>(halo, row, column, keys, seen, arguments.rpb, bias);
          Numbers product, grad_weight;
          Elements weight, grad_logit;
          if (seen) {
            product = *reinterpret_cast<const Numbers*>(products + start + column);
            grad_weight = *reinterpret_cast<const Numbers*>(grad_weights + start + column);
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            Number p = 0, ds = 0;
            if (seen >> i & 1) {
              // S = scale Q K^T + bias, P = exp(S - lse), dS = P (dP - delta)
              p = exponential(scale * product.element[i] + bias[i] - lse);
              ds = p * (grad_weight.element[i] - delta);
            }
            weight.element[i] = convert<Element>(p * Number(weight_factor<Element>()));
            grad_logit.element[i] = convert<Element>(ds);
          }
          *reinterpret_cast<Elements*>(arguments.weights + start + column) = weight;
          *reinterpret_cast<Elements*>(arguments.grad_logits + start + column) = grad_logit;
        }
      });
}

}  // namespace cuneigh::gemm
