// The gradients of neighborhood attention of small windows on tensor cores, the logits recomputed:
// the products of fused/backward.cu on the slabs and lists of fused/small/forward.cu. Sixteen
// columns are done at a time, since no maximum has to be known first. The kernel for queries
// computes their statistics on the way and leaves them for the one for keys (sums/delta.cu says
// what they are).
//
// blockIdx.x: (part of the batch, head, box of rows). The plan is that of fused/small/forward.cu,
// with one buffer; kWhole and kLse are false.

#include "cuneigh/softmax.cuh"
#include "fused/mma.cuh"
#include "fused/small/small.cuh"

namespace cuneigh::fused::small {

template <typename Plan>
struct HaloBackward {
  using Const = View<const typename Plan::Element, Plan::kRank>;
  Const row_key, row_value;              // query and grad_output, or key and value
  Const column_key, column_value;        // key and value, or query and grad_output
  View<float2, Plan::kRank> statistics;  // written if the rows are queries, else read
  View<typename Plan::Element, Plan::kRank> grad_key, grad_value;  // of the rows; queries have one
  Const output;                                                    // if the rows are queries
  View<const float, Plan::kRank> lse, grad_lse;                    // likewise; grad_lse may be null
};

// The rows of a block in memory: where each array begins, and the steps to each row.
template <typename Plan>
struct Rows {
  struct Steps {
    unsigned key, value, grad_key, grad_value, output, statistics, lse, grad_lse;
  };

  Origin<const typename Plan::Element> key, value, output;
  Origin<typename Plan::Element> grad_key, grad_value;
  Origin<float2> statistics;
  Origin<const float> lse, grad_lse;
  Steps steps[HaloTables<Plan>::kRows];
};

// product = rows columns^T, for sixteen of each. address(d) is that of dimension d + lane / 8 % 2 *
// 8 of column lane / 16 * 8 + lane % 8.
template <int kDim, typename Address, typename Element>
__device__ void multiply(const unsigned (&rows)[kDim / 16][4], Address address,
                         float (&product)[2][4], Element) {
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned fragment[4];
    ldmatrix_x4(fragment, address(d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (d == 0)
        mma_m16n8k16_zero(product[i], rows[0], fragment[2 * i], fragment[2 * i + 1], Element());
      else
        mma_m16n8k16(product[i], rows[d / 16], fragment[2 * i], fragment[2 * i + 1], Element());
    }
  }
}

// sum += weights columns, for sixteen rows and columns. address(d) is that of dimension
// d + lane / 16 * 8 of column lane % 16.
template <int kDim, typename Address, typename Element>
__device__ void accumulate(const float (&weight)[2][4], Address address, float (&sum)[kDim / 8][4],
                           Element) {
  unsigned weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    weights[i] = pack(weight[i / 2][i % 2 * 2], weight[i / 2][i % 2 * 2 + 1], Element());
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned fragment[4];
    ldmatrix_x4_trans(fragment, address(d));
    mma_m16n8k16(sum[d / 8], weights, fragment[0], fragment[1], Element());
    mma_m16n8k16(sum[d / 8 + 1], weights, fragment[2], fragment[3], Element());
  }
}

// sum(grad_output * output) of rows lane / 4 and lane / 4 + 8, from the diagonal of a product.
template <typename Plan, typename Element, int kPitch>
__device__ float2 delta_of_rows(const Element (*rows_smem)[kPitch], int lane) {
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  unsigned grad_outputs[kValueDim / 16][4];
#pragma unroll
  for (int d = 0; d < kValueDim; d += 16)
    take_rows(rows_smem, kHeadDim + d, lane, grad_outputs[d / 16]);
  const auto output_of = [&](int d) {
    return address_of(rows_smem, 0, lane / 16 * 8 + lane % 8, kHeadDim + kValueDim + d,
                      lane / 8 % 2 * 8);
  };
  float product[2][4];
  multiply<kValueDim>(grad_outputs, output_of, product, Element());
  const int row = lane / 4, holder = row * 4 + row / 2;
  const bool odd = row % 2;
  return {__shfl_sync(0xffffffffu, odd ? product[0][1] : product[0][0], holder),
          __shfl_sync(0xffffffffu, odd ? product[1][3] : product[1][2], holder)};
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    backward(const HaloProblem<Plan::kRank> problem, const HaloBackward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  extern __shared__ __align__(128) char memory_smem[];
  constexpr int kRowDim = kHeadDim + kValueDim + (Plan::kRowsAreKeys ? 0 : kValueDim);
  auto& smem = *reinterpret_cast<HaloMemory<Plan, kRowDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ Rows<Plan> rows;
  using Steps = typename Rows<Plan>::Steps;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    rows.steps[row] = {steps_to(arguments.row_key, token),  steps_to(arguments.row_value, token),
                       steps_to(arguments.grad_key, token), steps_to(arguments.grad_value, token),
                       steps_to(arguments.output, token),   steps_to(arguments.statistics, token),
                       steps_to(arguments.lse, token),      steps_to(arguments.grad_lse, token)};
  });
  __syncthreads();
  if (threadIdx.x == 96) {
    const int head = tables.rows.head;
    rows.key = origin_of(arguments.row_key, head);
    rows.value = origin_of(arguments.row_value, head);
    rows.grad_key = origin_of(arguments.grad_key, head);
    rows.grad_value = origin_of(arguments.grad_value, head);
    rows.output = origin_of(arguments.output, head);
    rows.statistics = origin_of(arguments.statistics, head);
    rows.lse = origin_of(arguments.lse, head);
    rows.grad_lse = origin_of(arguments.grad_lse, head);
  }
  fill_steps<Plan>(problem, arguments.column_key, arguments.column_value, arguments.statistics,
                   smem);
  fill_lists<Plan>(problem, warp, lane, smem);
  __syncthreads();

  auto* rows_smem = &smem.row[0][warp * 16];
  auto load = [&](const Slab& slab) {
    load_slab(problem, slab, smem, 0);
    if constexpr (Plan::kRowsAreKeys) {
      const float2* source = first_of(problem, tables.statistics, slab, tables);
      for (int i = threadIdx.x; i < tables.places; i += Plan::kWarps * 32) {
        copy_8_bytes(&smem.statistics()[i], step_by(source, smem.steps()[i].statistics), true);
      }
    }
    if (slab.is_first()) {
      const Steps* steps = &rows.steps[warp * 16];
      load_rows<kHeadDim, &Steps::key>(entry_of(rows.key, slab.batch), steps, lane, rows_smem, 0);
      load_rows<kValueDim, &Steps::value>(entry_of(rows.value, slab.batch), steps, lane, rows_smem,
                                          kHeadDim);
      if constexpr (!Plan::kRowsAreKeys)
        load_rows<kValueDim, &Steps::output>(entry_of(rows.output, slab.batch), steps, lane,
                                             rows_smem, kHeadDim + kValueDim);
    }
    cp_async_commit();
  };
  Slab slab = {tables.rows.batch * problem.part, 0, 0};
  load(slab);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8
  const int first_row = warp * 16 + lane / 4;
  float grad_key[kHeadDim / 8][4] = {};
  float grad_value[kValueDim / 8][4] = {};

  float2 statistics[2];  // of the rows if they are queries, else of two columns
  while (true) {
    const bool is_first = slab.is_first();
    if (!Plan::kRowsAreKeys && is_first) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Steps& steps = rows.steps[first_row + half * 8];
        const float lse = *step_by(entry_of(rows.lse, slab.batch), steps.lse);
        const float grad_lse = rows.grad_lse.data == nullptr
                                   ? 0.0f
                                   : *step_by(entry_of(rows.grad_lse, slab.batch), steps.grad_lse);
        statistics[half] = {1.44269504f * finite_shift(lse), -grad_lse};
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (!Plan::kRowsAreKeys && is_first) {
      const float2 delta = delta_of_rows<Plan>(rows_smem, lane);
      statistics[0].y += delta.x;
      statistics[1].y += delta.y;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + half * 8;
        if (lane % 4 == 0 && tables.exists[row])
          *step_by(entry_of(rows.statistics, slab.batch), rows.steps[row].statistics) =
              statistics[half];
      }
    }

    const unsigned first = smem.first(slab.index, warp);
    if (first != kNothing) {
      const auto [visible] = smem.visible(slab.index, warp, lane);
      unsigned key_rmem[kHeadDim / 16][4], value_rmem[kValueDim / 16][4];
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) take_rows(rows_smem, d, lane, key_rmem[d / 16]);
#pragma unroll
      for (int d = 0; d < kValueDim; d += 16)
        take_rows(rows_smem, kHeadDim + d, lane, value_rmem[d / 16]);
      const ListAddresses<Plan> addresses(smem.slab_of(0), first, tables, lane);
#pragma unroll
      for (int n = 0; n < Plan::kColumns; n += 16) {
        // Near a border keys are seen by more queries than elsewhere, where lists are not full
        const unsigned any = (visible[0] | visible[1]) >> (n / 4) & 0xf;
        if (Plan::kRowsAreKeys && !__any_sync(0xffffffffu, any)) continue;

        // S and dP
        const unsigned across = addresses.across(n);
        const auto key_of = [&](int d) { return chunk_of(across, d / 8); };
        const auto value_of = [&](int d) { return chunk_of(across, (kHeadDim + d) / 8); };
        float weight[2][4], grad_weight[2][4];
        multiply<kHeadDim>(key_rmem, key_of, weight, Element());
        multiply<kValueDim>(value_rmem, value_of, grad_weight, Element());

        // P and dS; what is hidden stays 0 whatever it is multiplied with
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          if constexpr (Plan::kRowsAreKeys) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const unsigned place = first + tables.list[n + t * 8 + lane % 4 * 2 + i];
              statistics[i] = smem.statistics()[place / kColumnBytes<Plan>];
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto [shift, delta] = statistics[Plan::kRowsAreKeys ? i % 2 : i / 2];
            const bool sees = visible[i / 2] >> (n / 4 + t * 2 + i % 2) & 1;
            const float p = sees ? ex2_approx(fmaf(weight[t][i], problem.scale, -shift)) : 0.0f;
            const float ds = sees ? p * (grad_weight[t][i] - delta) : 0.0f;
            weight[t][i] = p;
            grad_weight[t][i] = ds;
          }
        }
        const unsigned along = addresses.along(n);
        const auto first_of_column = [&](int d) { return chunk_of(along, d / 8); };
        const auto second_of_column = [&](int d) { return chunk_of(along, (kHeadDim + d) / 8); };
        if constexpr (Plan::kRowsAreKeys)
          accumulate<kValueDim>(weight, second_of_column, grad_value, Element());
        accumulate<kHeadDim>(grad_weight, first_of_column, grad_key, Element());
      }
    }

    Slab next = slab;
    const bool more = advance<Plan>(problem, tables, next);
    __syncthreads();
    if (more) load(next);
    const int batch = slab.batch;
    slab = next;
    if (more && !next.is_first()) continue;

    // After the last slab of a batch entry
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      const auto steps = rows.steps[row];
      store_row<kHeadDim>(grad_key, half, problem.gradient_scale, tables.exists[row], lane,
                          step_by(entry_of(rows.grad_key, batch), steps.grad_key));
      if constexpr (Plan::kRowsAreKeys)
        store_row<kValueDim>(grad_value, half, 1.0f, tables.exists[row], lane,
                             step_by(entry_of(rows.grad_value, batch), steps.grad_value));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) grad_key[d][i] = 0;
#pragma unroll
      for (int d = 0; d < kValueDim / 8; ++d) grad_value[d][i] = 0;
    }
    if (!more) break;
  }
}

}  // namespace cuneigh::fused::small
