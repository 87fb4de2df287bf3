// The gradients of neighborhood attention of small windows on tensor cores, the logits recomputed:
// the products of fused_backward.cu on the slabs and lists of halo_forward.cu. Sixteen columns are
// done at a time, since no maximum has to be known first.
//
// blockIdx.x: (part of the batch, head, box of rows). The plan is that of halo_forward.cu
// without kWhole.

#include "cuneigh/halo.cuh"
#include "cuneigh/mma.cuh"

namespace cuneigh {

template <typename Plan>
struct HaloBackward {
  using Const = View<const typename Plan::Element, Plan::kRank>;
  Const row_key, row_value;                    // query and grad_output, or key and value
  Const column_key, column_value;              // key and value, or query and grad_output
  View<const float2, Plan::kRank> statistics;  // by fused_delta
  View<typename Plan::Element, Plan::kRank> grad_key, grad_value;  // of the rows; queries have one
};

struct RowStep {
  unsigned key, value, statistics, grad_key, grad_value;
};

// product = rows columns^T, for sixteen of each. A lane's address is that of dimensions
// lane / 8 % 2 * 8 of column lane / 16 * 8 + lane % 8.
template <int kDim, typename Element>
__device__ void multiply(const unsigned (&rows)[kDim / 16][4], unsigned columns,
                         float (&product)[2][4], Element) {
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned fragment[4];
    ldmatrix_x4(fragment, columns + d * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (d == 0)
        mma_m16n8k16_zero(product[i], rows[0], fragment[2 * i], fragment[2 * i + 1], Element());
      else
        mma_m16n8k16(product[i], rows[d / 16], fragment[2 * i], fragment[2 * i + 1], Element());
    }
  }
}

// sum += weights columns, for sixteen rows and columns. A lane's address is that of dimensions
// lane / 16 * 8 of column lane % 16.
template <int kDim, typename Element>
__device__ void accumulate(const float (&weight)[2][4], unsigned columns, float (&sum)[kDim / 8][4],
                           Element) {
  unsigned weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    weights[i] = pack(weight[i / 2][i % 2 * 2], weight[i / 2][i % 2 * 2 + 1], Element());
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    unsigned fragment[4];
    ldmatrix_x4_trans(fragment, columns + d * 2);
    mma_m16n8k16(sum[d / 8], weights, fragment[0], fragment[1], Element());
    mma_m16n8k16(sum[d / 8 + 1], weights, fragment[2], fragment[3], Element());
  }
}

template <typename Plan>
__global__ void __launch_bounds__(Plan::kWarps * 32, Plan::kBlocks)
    halo_backward(const HaloProblem<Plan::kRank> problem, const HaloBackward<Plan> arguments) {
  using Element = typename Plan::Element;
  constexpr int kHeadDim = Plan::kHeadDim, kValueDim = Plan::kValueDim;
  extern __shared__ __align__(16) char memory_smem[];
  auto& smem = *reinterpret_cast<HaloMemory<Plan, kHeadDim + kValueDim>*>(memory_smem);
  const auto& tables = smem.tables;
  __shared__ RowStep steps_smem[HaloTables<Plan>::kRows];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  fill_tables<Plan>(problem, smem.tables, [&](int row, const int (&token)[Plan::kRank]) {
    steps_smem[row] = {step_to<8>(arguments.row_key, token), step_to<8>(arguments.row_value, token),
                       step_to<1>(arguments.statistics, token),
                       step_to<8>(arguments.grad_key, token),
                       step_to<8>(arguments.grad_value, token)};
  });
  __syncthreads();
  fill_steps<Plan>(problem, arguments.column_key, arguments.column_value, arguments.statistics,
                   smem);
  __syncthreads();

  // The statistics of a column follow its vectors, in what pads them
  constexpr int kStatistics = (kHeadDim + kValueDim) * sizeof(Element);
  auto load = [&](const Slab& slab, int buffer) {
    char* first = smem.column(buffer, 0);
    load_slab<kHeadDim, 0>(problem, slab, arguments.column_key, smem, first);
    load_slab<kValueDim, 1>(problem, slab, arguments.column_value, smem,
                            first + kHeadDim * sizeof(Element));
    if constexpr (Plan::kRowsAreKeys) {
      const float2* source = first_of<2, Plan>(problem, slab, arguments.statistics, tables);
      for (int i = threadIdx.x; i < tables.places; i += Plan::kWarps * 32) {
        const auto& step = smem.steps()[i];
        copy_8_bytes(first + step.target + kStatistics, source + step.statistics, true);
      }
    }
    load_rows<kHeadDim, &RowStep::key>(arguments.row_key.at(slab.batch, tables.rows.head),
                                       &steps_smem[warp * 16], lane, &smem.row[buffer][warp * 16],
                                       0);
    load_rows<kValueDim, &RowStep::value>(arguments.row_value.at(slab.batch, tables.rows.head),
                                          &steps_smem[warp * 16], lane,
                                          &smem.row[buffer][warp * 16], kHeadDim);
    cp_async_commit();
  };
  Slab slab = first_slab<Plan>(problem, tables);
  load(slab, 0);

  // Rows lane / 4 and lane / 4 + 8 of the warp's sixteen are this thread's, in columns
  // 2 * (lane % 4) and the one after of every 8
  const int first_row = warp * 16 + lane / 4;
  const float scale = problem.scale * 1.44269504f;  // logits in base 2
  float grad_key[kHeadDim / 8][4] = {};
  float grad_value[kValueDim / 8][4] = {};

  List list = {};
  list.begin = -1;
  for (int buffer = 0;; buffer ^= Plan::kBuffers - 1) {
    const int head = tables.rows.head;
    float2 statistics[2];  // of the rows if they are queries, else of two columns
    if constexpr (!Plan::kRowsAreKeys) {
      const float2* of_head = arguments.statistics.at(slab.batch, head);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        statistics[half] = of_head[steps_smem[first_row + half * 8].statistics];
    }
    cp_async_wait<0>();
    __syncthreads();
    Slab next = slab;
    bool more;
    if (Plan::kBuffers == 2) {
      more = advance<Plan>(problem, tables, next);
      if (more) load(next, buffer ^ 1);
    }

    if (slab.begin != list.begin) list = list_of<Plan>(problem, slab, tables, warp, lane);
    if (list.meets) {
      unsigned key_rmem[kHeadDim / 16][4], value_rmem[kValueDim / 16][4];
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16)
        take_rows(&smem.row[buffer][warp * 16], d, lane, key_rmem[d / 16]);
#pragma unroll
      for (int d = 0; d < kValueDim; d += 16)
        take_rows(&smem.row[buffer][warp * 16], kHeadDim + d, lane, value_rmem[d / 16]);
      const char* columns = smem.column(buffer, list.first);
#pragma unroll
      for (int n = 0; n < Plan::kColumns; n += 16) {
        // Near a border keys are seen by more queries than elsewhere, where lists are not full
        const unsigned seen = (list.visible[0] | list.visible[1]) >> (n / 4) & 0xf;
        if (Plan::kRowsAreKeys && !__any_sync(0xffffffffu, seen)) continue;

        // S and dP
        const unsigned across =
            shared_address(columns) + lane / 8 % 2 * 16 + tables.list[n + lane / 16 * 8 + lane % 8];
        float weight[2][4], grad_weight[2][4];
        multiply<kHeadDim>(key_rmem, across, weight, Element());
        multiply<kValueDim>(value_rmem, across + kHeadDim * 2, grad_weight, Element());

        // P and dS; what is hidden stays 0 whatever it is multiplied with
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          if constexpr (Plan::kRowsAreKeys) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int bytes = tables.list[n + t * 8 + lane % 4 * 2 + i];
              statistics[i] = *reinterpret_cast<const float2*>(columns + bytes + kStatistics);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto [shift, delta] = statistics[Plan::kRowsAreKeys ? i % 2 : i / 2];
            const bool visible = list.visible[i / 2] >> (n / 4 + t * 2 + i % 2) & 1;
            const float p = visible ? ex2_approx(fmaf(weight[t][i], scale, -shift)) : 0.0f;
            const float ds = p == 0 ? 0.0f : p * (grad_weight[t][i] - delta);
            weight[t][i] = p;
            grad_weight[t][i] = ds;
          }
        }
        const unsigned along =
            shared_address(columns) + lane / 16 * 16 + tables.list[n + lane % 16];
        if constexpr (Plan::kRowsAreKeys)
          accumulate<kValueDim>(weight, along + kHeadDim * 2, grad_value, Element());
        accumulate<kHeadDim>(grad_weight, along, grad_key, Element());
      }
    }

    if (Plan::kBuffers == 1) {
      more = advance<Plan>(problem, tables, next);
      __syncthreads();
      if (more) load(next, 0);
    }
    const int batch = slab.batch;
    slab = next;
    if (more && next.batch == batch) continue;

    // After the last slab of a batch entry
    Element* grad_keys = arguments.grad_key.at(batch, head);
    Element* grad_values = arguments.grad_value.at(batch, head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      store_row<kHeadDim>(grad_key, half, problem.scale, tables.exists[row], lane,
                          step_by(grad_keys, steps_smem[row].grad_key));
      if constexpr (Plan::kRowsAreKeys)
        store_row<kValueDim>(grad_value, half, 1.0f, tables.exists[row], lane,
                             step_by(grad_values, steps_smem[row].grad_value));
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

}  // namespace cuneigh
