// Neighborhood attention and its tangent in one pass: a group of lanes takes one query, walks over
// the keys that it sees, and keeps a running softmax P of the logits S. Where every operand moves
// along its tangent,
//
//   dS = scale (dQ K^T + Q dK^T) + dbias,   dlse = sum(P dS),   dO = sum(P dS V + P dV) - dlse O
//
// Nothing of the size of the logits is stored.
//
// blockIdx.x: a box of queries of one batch and head; blockIdx.y: a slice of value_dim.

#include "cuneigh/layout.cuh"
#include "cuneigh/operands.cuh"
#include "cuneigh/row.cuh"
#include "cuneigh/row_plan.cuh"
#include "cuneigh/softmax.cuh"

namespace cuneigh::naive {

template <typename Plan>
struct JvpArguments : KeyMask<Plan> {
  Operands<Plan> operands, tangents;
  OutputView<Plan> output, tangent_output;  // [batch, x1..xr, heads, value_dim], or null
  NumberView<Plan> lse, tangent_lse;        // [batch, x1..xr, heads], or null
};

template <typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    jvp(const Problem<Plan::kRank> problem, const JvpArguments<Plan> arguments) {
  using Element = typename Plan::Element;
  using Number = Accumulator<Element>;
  using Lanes = Group<Plan::kLanes>;
  using HeldKey = Held<KeyRow<Plan>, Plan::kWide>;
  constexpr int kKeys = 2;  // keys whose loads are in flight together

  const auto item = item_of<false>(problem, Lanes::index());
  if (!item.exists) return;
  const auto &operands = arguments.operands, &tangents = arguments.tangents;
  const int kv_head = item.head / problem.group_size;
  const int slice = blockIdx.y * ValueRow<Plan>::kCapacity;
  const int slice_size = problem.value_dim - slice;
  const Number scale = Number(problem.scale);

  const HeldKey query(operands.query.at(item.batch, item.token, item.head), problem.head_dim);
  const HeldKey d_query(tangents.query.at(item.batch, item.token, item.head), problem.head_dim);
  ValueRow<Plan> output, d_output;  // [slice_size]: P V, and P dS V + P dV
  Number d_lse = 0;                 // P dS
  Softmax<Number> softmax;

  // One line of keys [count, head_dim] and values [count, value_dim], and of their tangents
  struct Vectors {
    const Element* first;
    long long stride;
    __device__ const Element* at(int i) const { return first + i * stride; }
  };
  auto attend = [&](Vectors key, Vectors d_key, Vectors value, Vectors d_value, int count,
                    auto bias, auto d_bias, auto seen) {
    for (int begin = 0; begin < count; begin += kKeys) {
      Number logit[kKeys] = {}, d_logit[kKeys] = {};
      ValueRow<Plan> row[kKeys], d_row[kKeys];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);  // the last key again past the end
        if (!seen(neighbor)) continue;                       // whose numbers may be anything
        KeyRow<Plan> key_row;
        key_row.load(key.at(neighbor), problem.head_dim);
        logit[i] = query.dot(key_row, key.at(neighbor));
        d_logit[i] = d_query.dot(key_row, key.at(neighbor)) + query.dot(d_key.at(neighbor));
        row[i].load(value.at(neighbor), slice_size);
        d_row[i].load(d_value.at(neighbor), slice_size);
      }

      // S = scale Q K^T + bias, dS
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int neighbor = smaller(begin + i, count - 1);
        const Number sum = scale * Lanes::sum(logit[i]) + bias(neighbor);
        logit[i] = begin + i < count && seen(neighbor) ? sum : -infinity<Number>();
        d_logit[i] = scale * Lanes::sum(d_logit[i]) + d_bias(neighbor);
      }

      // P = exp(S - max); where it is 0, dS counts nothing whatever it is
      const Number factor = softmax.update(logit);
      output.scale(factor);
      d_output.scale(factor);
      d_lse *= factor;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const Number moving = logit[i] == 0 ? Number(0) : logit[i] * d_logit[i];
        d_lse += moving;
        output.add(logit[i], row[i]);
        d_output.add(moving, row[i]);
        d_output.add(logit[i], d_row[i]);
      }
    }
  };

  // The keys of the window, line by line
  Range window[Plan::kRank];
  window_of(problem, item, window);
  const long long dilation = problem.axes[Plan::kRank - 1].dilation;
  for_each_line<false>(problem, item, window, [&](const Line<Plan::kRank>& line) {
    auto vectors = [&](const ConstView<Plan>& view, int first) -> Vectors {
      return {view.at(item.batch, line.first, kv_head) + first,
              dilation * view.token[Plan::kRank - 1]};
    };
    attend(vectors(operands.key, 0), vectors(tangents.key, 0), vectors(operands.value, slice),
           vectors(tangents.value, slice), line.count,
           bias_of<Plan, false>(problem, operands.rpb, item.head, line),
           bias_of<Plan, false>(problem, tangents.rpb, item.head, line),
           arguments.seen_in(problem, item.batch, line.first));
  });

  // The additional keys
  auto additional = [&](const ConstView<Plan>& view, int first) -> Vectors {
    return {view.at(item.batch, kv_head) + first, view.token[0]};
  };
  auto no_bias = [](int) { return Number(0); };
  attend(additional(operands.additional_keys, 0), additional(tangents.additional_keys, 0),
         additional(operands.additional_values, slice),
         additional(tangents.additional_values, slice), problem.additional, no_bias, no_bias,
         [](int) { return true; });

  // Divided by sum(P)
  const Number normalizer = softmax.normalizer();
  output.scale(normalizer);
  d_output.scale(normalizer);
  d_lse *= normalizer;
  d_output.add(-d_lse, output);
  if (arguments.output.data)
    output.store(arguments.output.at(item.batch, item.token, item.head) + slice, slice_size);
  if (arguments.tangent_output.data)
    d_output.store(arguments.tangent_output.at(item.batch, item.token, item.head) + slice,
                   slice_size);
  if (blockIdx.y > 0 || Lanes::lane() > 0) return;
  if (arguments.lse.data) *arguments.lse.at(item.batch, item.token, item.head) = softmax.lse();
  if (arguments.tangent_lse.data)
    *arguments.tangent_lse.at(item.batch, item.token, item.head) = d_lse;
}

}  // namespace cuneigh::naive
