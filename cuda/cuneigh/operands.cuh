// The operands of attention, or their tangents, for kernels that give every token to a group of
// lanes.
#pragma once

#include "cuneigh/row_plan.cuh"

namespace cuneigh {

template <typename Plan>
struct Operands {
  ConstView<Plan> query, key;                          // [batch, x1..xr, heads, head_dim]
  ConstView<Plan> value;                               // [batch, x1..xr, kv_heads, value_dim]
  ConstView<Plan> additional_keys, additional_values;  // [batch, n, kv_heads, dim], or null
  BiasView<Plan> rpb;                                  // [heads, 2 K - 1, ..], or null
};

}  // namespace cuneigh
