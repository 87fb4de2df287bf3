// All gradients of attention on Hopper's tensor cores, by five products. Rows are keys, columns are
// queries. With P = 2^(scale S - lse) and dS = P * (dP - delta), a consumer does for each box of
// queries, of each query head that reads its keys,
//   S^T = K Q^T, dP^T = V dO^T, P^T and dS^T, dV += P^T dO, dQ = dS K, dK += dS^T Q,
// and multiplies dK by the scale in the end. The transposed weights stay in registers: they are
// left operands of dV and dK. For dQ the warpgroups meet: each writes its dS to shared memory, and
// makes its part of dQ, half of the columns or of the queries (`SumMemory`), from the dS and the
// keys of both. Producers add that to sums in memory (sums.cuh). The last blocks to begin round
// these sums, which gives dQ (rounding.cuh).
//
// The probabilities are computed while dP^T is, dS^T while dV is. dQ is that of the box before: by
// then the other warpgroup has written its dS, though it may be half a box behind, which is where
// it fills the gaps that this one leaves to the tensor cores. A warpgroup that sees nothing of a
// box shares zeros, and makes its part of dQ only. dQ leaves while dK is made; dK and dV leave at
// the end of a tile, through the memory of contributions. Producers have their own roles
// (producers.cuh); tiles and barriers are those of the forward pass (forward.cu).
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "hopper/gradients.cuh"
#include "hopper/producers.cuh"
#include "hopper/rounding.cuh"

namespace cuneigh::hopper {

template <typename Plan>
struct BackwardArguments : HiddenKeys<Plan> {
  OfQueries<Plan> queries;
  View<typename Plan::Element, Plan::kRank> grad_key, grad_value, grad_query;
  Sums sums;        // of dQ
  unsigned* taken;  // 0 before the launch; see `begin_tiles`
};

// How a warpgroup makes its contribution to dQ of a box of queries, [64, 64] (`SumMemory`).
template <typename Plan>
struct QueryGradient {
  static constexpr int kTiles = kLineElements / 8;

  SharedMemory<Plan>& smem;
  const int w;
  unsigned transposed;     // where this thread writes dS, in the first slot
  Ring<2> exchange;        // of dS: the slot of the current box
  Ring<1> sum;             // the next contribution
  Ring<kUnitSlots> place;  // of the units of the next contribution's queries
  float units[2];          // of this thread's two, in the next contribution

  __device__ QueryGradient(SharedMemory<Plan>& smem, int w, int thread) : smem(smem), w(w) {
    transposed = shared_address(smem.grad_logit[0][w]) + place_transposed(thread);
  }

  // Writes dS of the current box, given this thread's part of dS^T [64, kColumns].
  template <int kSteps>
  __device__ void share(const unsigned (&grad_logit)[kSteps][4]) {
    smem.exchange_empty[exchange.slot()].wait(exchange.parity() ^ 1);
    store_transposed(grad_logit, transposed + exchange.slot() * sizeof(smem.grad_logit[0]));
    if constexpr (kMayOverflow<Plan>)
      if (!are_finite(grad_logit))
        smem.overflows[Ring<kUnitSlots>{exchange.position}.slot()] = true;
    fence_shared();
    smem.exchange_full[exchange.slot()].arrive_as_warp();
  }

  // Until there is room for the next contribution. Before it is stored, the part of a warp, 16 rows
  // of 256 bytes, may be used for something else.
  __device__ void wait_for_room() const { smem.sum_empty[w].wait(sum.parity() ^ 1); }
  __device__ int4 (*room(int thread) const)[16] {
    return reinterpret_cast<int4(*)[16]>(smem.sum[w][thread / 32 * 2]);
  }

  // Until all warpgroups have shared dS of the box before.
  __device__ void wait() const {
    smem.exchange_full[exchange.before().slot()].wait(exchange.before().parity());
  }

  // Issues dQ = dS K of the box before; `keys` is the line of the keys of all that is multiplied.
  __device__ void issue(float (&grad_query)[kTiles][4], Descriptor keys, int row) {
    const int first = smem.first_query(w);
    const Descriptor grad_logits = rows_descriptor(shared_address(smem.grad_logit[0][0][first]));
    constexpr int kSlot = sizeof(smem.grad_logit[0]) / kDescriptorBytes;
    multiply_transposed<typename Plan::Element, Plan::kWarpgroups, kLineElements>(
        grad_query, grad_logits + exchange.before().slot() * kSlot, sizeof(smem.grad_logit[0][0]),
        keys, sizeof(smem.row[0]));
#pragma unroll
    for (int half = 0; half < 2; ++half)
      units[half] = smem.units[place.slot()][first + row + 8 * half];
  }

  // Hands dQ of the box before to `add_sums`, in units.
  __device__ void store(const float (&grad_query)[kTiles][4], int thread) {
    smem.exchange_empty[exchange.before().slot()].arrive_as_warp();
    wait_for_room();
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // a row of this lane, and a granule of its warp
      int4(*granule)[32] = smem.sum[w][thread / 32 * 2 + half];
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        const float *two = grad_query[i] + 2 * half, *next = grad_query[i + 1] + 2 * half;
        const auto count = [&](float number) { return __float2int_rn(number * units[half]); };
        granule[i / 2][thread % 32] =
            make_int4(count(two[0]), count(two[1]), count(next[0]), count(next[1]));
      }
    }
    smem.sum_full[w].arrive_as_warp();
    sum.advance();
    place.advance();
  }

  // All of that, where this warpgroup has nothing else to do with a box.
  __device__ void make(Descriptor keys, const Consumer<Plan>& me) {
    float grad_query[kTiles][4];  // [64, 64]
    wait();
    issue(grad_query, keys, me.row());
    wait_for_products<0>();
    hold(grad_query);
    store(grad_query, me.thread);
  }
};

// Where the rows of dK and dV are that a warp has.
template <typename Plan>
struct KeyRows {
  using Element = typename Plan::Element;
  Element *key, *value;       // of row number lane % 16
  unsigned existing, hidden;  // a bit for each row; hidden ones are to be zero

  __device__ KeyRows(const HopperProblem<Plan::kRank>& problem,
                     const BackwardArguments<Plan>& arguments, const Tile<Plan::kRank>& tile,
                     int w) {
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
    const int head = tile.head + problem.warpgroup[w][0];
    int token[Plan::kRank];
    const bool exists = token_of_row<Plan>(problem, tile, w, row, token);
    key = arguments.grad_key.at(tile.batch, token, head);
    value = arguments.grad_value.at(tile.batch, token, head);
    existing = __ballot_sync(0xffffffffu, exists);
    hidden = __ballot_sync(0xffffffffu, exists && arguments.hides(tile.batch, token));
  }
};

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void differentiate(const HopperProblem<Plan::kRank>& problem,
                              const BackwardArguments<Plan>& arguments, SharedMemory<Plan>& smem,
                              int w) {
  using Element = typename Plan::Element;
  using Smem = SharedMemory<Plan>;
  // dP^T of a box is made in parts of 64 columns: for more at once there are no registers
  constexpr int kParts = Plan::kColumns / 64;
  constexpr int kTiles = 8, kSteps = 4;           // of a part
  constexpr int kAllSteps = Plan::kColumns / 16;  // of a box
  constexpr int kPartAt = 64 * kLineBytes / kDescriptorBytes;
  static_assert(kParts == 1 || Smem::kVoLines == 1, "parts of dO follow each other");
  Consumer<Plan> me(smem, w);
  QueryGradient<Plan> dq(smem, w, me.thread);
  const Descriptor rows_at = rows_descriptor(shared_address(smem.row));
  const Descriptor queries_at = rows_descriptor(shared_address(smem.column_qk));
  const Descriptor grad_outputs_at = rows_descriptor(shared_address(smem.column_vo));
  const Descriptor query_columns_at =
      columns_descriptor(shared_address(smem.column_qk), sizeof(smem.column_qk[0][0]));
  const Descriptor grad_output_columns_at =
      columns_descriptor(shared_address(smem.column_vo), sizeof(smem.column_vo[0][0]));
  const Descriptor key_columns_at =  // of the line that dQ is made of here
      columns_descriptor(shared_address(smem.row[0][smem.sum_line(w)]), sizeof(smem.row[0][0]));

  unsigned numbers[2];  // of this thread's rows
#pragma unroll
  for (int half = 0; half < 2; ++half) numbers[half] = me.numbers(half);

  while (me.begin_tile()) {
    constexpr int kSlot = sizeof(smem.row[0]) / kDescriptorBytes;
    const Descriptor keys = rows_at + me.rows.slot() * kSlot;
    const Descriptor values = keys + Smem::kQkLines * (sizeof(smem.row[0][0]) / kDescriptorBytes);
    const Descriptor key_columns = key_columns_at + (me.rows.slot() - w) * kSlot;
    float grad_key[Plan::kHeadColumns / 8][4] = {};     // dK [64, kHeadColumns]
    float grad_value[Plan::kValueColumns / 8][4] = {};  // dV [64, kValueColumns]
    bool is_first = true;
    // Of a box of which this warpgroup sees nothing dS is 0
    const auto pass = [&] {
      constexpr unsigned kZeros[kAllSteps][4] = {};
      dq.share(kZeros);
      if (!is_first) dq.make(key_columns, me);
      dq.exchange.advance();
      is_first = false;
    };

    int visibility = me.begin_box(me.look_at(me.boxes), pass);
    while (visibility != kNone) {
      asm volatile("" : "+r"(me.thread));  // what follows from it is not kept: registers are few
      const unsigned stage = me.boxes.slot();
      const unsigned qk = stage * (sizeof(smem.column_qk[0]) / kDescriptorBytes);
      const unsigned vo = stage * (sizeof(smem.column_vo[0]) / kDescriptorBytes);
      // S^T = K Q^T, [64, kColumns] = [64, kHeadDim] [kColumns, kHeadDim]^T
      float logit[kParts][kTiles][4], lse[kParts][2 * kTiles], delta[4 * kAllSteps];
      const auto& statistics = smem.statistics[stage];
      const auto read_lse = [&](int part) {
        read(statistics.lse[me.quad()].of_columns + 2 * kTiles * part, lse[part]);
      };
      read_lse(0);
      multiply<Element, Plan::kHeadDim, Plan::kColumns>(flat(logit), keys, queries_at + qk);
      // Like `Consumer::look`, but with the words of all axes apart: to join them, they would be
      // waited for before dP^T is issued. With a mask there are no registers for that
      unsigned word[2][Plan::kRank];
      const auto read_words = [&] {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          asm volatile("" : "+r"(numbers[half]));  // to be unpacked here: registers are few
          me.read(numbers[half], word[half]);
        }
      };
      if (!Plan::kKeyMask && visibility == kPartial) read_words();
      me.wait_for_vo();
      // dP^T = V dO^T, [64, 64] = [64, kValueDim] [64, kValueDim]^T
      float grad_weight[kParts][kTiles][4];
      const auto multiply_part = [&](int part) {
        multiply<Element, Plan::kValueDim, 64>(grad_weight[part], values,
                                               grad_outputs_at + vo + part * kPartAt);
      };
      multiply_part(0);
      wait_for_products<1>();
      hold(flat(logit));
      if (Plan::kSigned) multiply_by(flat(logit), problem.sign);
      if (visibility == kPartial) {
        if (Plan::kKeyMask) read_words();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unsigned seen = me.is_hidden(half) ? 0 : ~0u;
#pragma unroll
          for (unsigned along : word[half]) seen &= along;
          hide(flat(logit), half, seen);
        }
      }
      unsigned weight[kParts][kSteps][4];  // P^T [64, kColumns]
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        exponentiate(logit[part], problem.scale, lse[part]);  // P^T, in place of S^T
        if (part + 1 < kParts)
          read_lse(part + 1);
        else
          read(statistics.delta[me.quad()].of_columns, delta);
        // dV += P^T dO, [64, kValueColumns] += [64, 64] [64, kValueColumns]
        pack_weights<Element>(logit[part], 0, weight[part]);
        accumulate<Element, Plan::kValueColumns>(grad_value, weight[part],
                                                 grad_output_columns_at + vo, 64 * part);
        if (part + 1 < kParts) multiply_part(part + 1);
      }
      wait_for_products<1>();
      hold(flat(grad_weight));
      unsigned grad_logit[kAllSteps][4];  // dS^T [64, kColumns]
      multiply_by_weights<Element>(flat(grad_weight), flat(weight), delta, grad_logit);
      dq.share(grad_logit);
      // dQ of the box before; that of a tile's first box, of nothing, goes nowhere
      float grad_query[QueryGradient<Plan>::kTiles][4];  // [64, 64]
      if (!is_first) dq.wait();
      dq.issue(grad_query, key_columns, me.row());
      // dK += dS^T Q, [64, kHeadColumns] += [64, kColumns] [kColumns, kHeadColumns]
      accumulate<Element, Plan::kHeadColumns>(grad_key, grad_logit, query_columns_at + qk);
      wait_for_products<1>();
      hold(grad_value);
      hold(grad_query);
      me.release_vo();
      if (!is_first) dq.store(grad_query, me.thread);
      const int ahead = me.look_ahead();
      wait_for_products<0>();
      hold(grad_key);
      me.release_qk();
      me.end_box();
      dq.exchange.advance();
      is_first = false;
      visibility = me.begin_box(ahead, pass);
    }
    float grad_query[QueryGradient<Plan>::kTiles][4];
    dq.wait();
    dq.issue(grad_query, key_columns, me.row());
    const KeyRows<Plan> rows(problem, arguments, me.tile(), w);
    wait_for_products<0>();
    hold(grad_query);
    me.release_rows();
    dq.wait_for_room();
    store_rows(grad_key, problem.gradient_scale, dq.room(me.thread), rows.key, problem.head_dim,
               rows.existing, rows.hidden);
    store_rows(grad_value, 1.0f, dq.room(me.thread), rows.value, problem.value_dim, rows.existing,
               rows.hidden);
    dq.store(grad_query, me.thread);
    me.end_tile();
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    backward(const HopperProblem<Plan::kRank> problem, const BackwardArguments<Plan> arguments,
             const __grid_constant__ TensorMap key, const __grid_constant__ TensorMap value,
             const __grid_constant__ TensorMap query,
             const __grid_constant__ TensorMap grad_output) {
  auto& smem = begin_block<Plan>(problem);
  if (!find_work(problem, arguments.sums, arguments.taken, smem))
    return round_sums(problem, arguments.sums, arguments.queries.units, arguments.grad_query, smem);
  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    // No column is an additional key: the last two maps are never used
    produce({key, value, query, grad_output, query, grad_output}, arguments.queries, arguments,
            arguments.sums, arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    differentiate(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
