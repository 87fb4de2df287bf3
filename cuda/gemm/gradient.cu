// From the dense logits and gradients of weights of tiles to the weights and the gradients of the
// logits, zeros for keys that a row does not see: dS = P * (dP - delta), P from lse. What is
// written may take the place of what is read.
//
// blockIdx.x: (tile, slice of its rows). A team of Plan::kLanes lanes takes a row. On the way it
// leaves delta = sum(grad_output * output) - grad_lse for the gradient of rpb.

#include "gemm/gemm.cuh"

namespace cuneigh::gemm {

template <typename Plan>
struct GradientArguments {
  BiasView<Plan> rpb;
  ConstView<Plan> grad_output, output;
  ConstNumberView<Plan> lse, grad_lse;  // grad_lse may be null
  NumberView<Plan> delta;               // may be null
  // [tiles, rows, columns] each
  const Accumulator<typename Plan::Element>* logits;
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

  for_each_row<Plan>(
      tiles, arguments.slices,
      [&](const Tile<Plan::kRank>& tile, const TileRow<Plan::kRank>& row, long long place) {
        Number delta = 0, shift = 0;
        if (row.exists) {
          const Element* grad_output = arguments.grad_output.at(tile.batch, row.token, row.head);
          const Element* output = arguments.output.at(tile.batch, row.token, row.head);
          for (int i = Lanes::lane(); i < problem.value_dim; i += Plan::kLanes)
            delta += convert<Number>(grad_output[i]) * convert<Number>(output[i]);
          delta = Lanes::sum(delta);
          if (arguments.grad_lse.data)
            delta -= *arguments.grad_lse.at(tile.batch, row.token, row.head);
          if (arguments.delta.data && Lanes::lane() == 0)
            *arguments.delta.at(tile.batch, row.token, row.head) = delta;
          shift = *arguments.lse.at(tile.batch, row.token, row.head);
          if (shift == -infinity<Number>()) shift = infinity<Number>();  // all weights are 0
        }
#pragma unroll 2
        for (int column = Lanes::lane() * kVector; column < tiles.columns;
             column += Plan::kLanes * kVector) {
          const unsigned seen = seen_keys<kVector>(tiles, halo, row, column, keys);
          Number bias[kVector];
          load_bias<Plan>(halo, row, column, keys, seen, arguments.rpb, bias);
          Numbers logit, grad_weight;
          Elements weight, grad_logit;
          if (seen) {
            logit = *reinterpret_cast<const Numbers*>(arguments.logits + place + column);
            grad_weight =
                *reinterpret_cast<const Numbers*>(arguments.grad_weights + place + column);
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            Number w = 0, g = 0;
            if (seen >> i & 1) {
              w = exponential(scale * logit.element[i] + bias[i] - shift);
              g = w * (grad_weight.element[i] - delta);
            }
            weight.element[i] = convert<Element>(w * Number(weight_factor<Element>()));
            grad_logit.element[i] = convert<Element>(g);
          }
          *reinterpret_cast<Elements*>(arguments.weights + place + column) = weight;
          *reinterpret_cast<Elements*>(arguments.grad_logits + place + column) = grad_logit;
        }
      });
}

}  // namespace cuneigh::gemm
