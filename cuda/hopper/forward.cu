// Attention on Hopper's tensor cores: output and lse of tiles of queries, nothing of the size of
// the logits in memory.
//
// A block has kWarpgroups warpgroups of consumers, each with a box of 64 queries, and one
// of producers. Blocks stay and take tile after tile; barriers alone hold the roles together:
//   warp 0       loads the boxes of keys and values into rings of kStages
//   warp 1       loads the queries of the tiles into a ring of kQuerySlots boxes
//   warps 2, 3   make the words that say which pairs of a box are visible
//   consumers    for each box: S = scale Q K^T, hide, P = 2^(S - max), O += P V; in the end O / sum
// Each consumer works serially; what one leaves of the tensor cores' time the others use. P V is
// issued in halves, so that its first half runs under the exponentials of the second.
//
// struct Plan {
//   static constexpr int kRank;         token axes
//   static constexpr int kWarpgroups;   of consumers, 2 or 3
//   static constexpr int kKeys;         keys of a box, 64 or 128
//   static constexpr int kStages;       boxes of keys, and of values, in shared memory
//   static constexpr int kQuerySlots;   boxes of queries in shared memory
//   static constexpr int kHeadDim;      dimension of query and key, padded to a multiple of 16
//   static constexpr int kValueDim;     columns of O; a width that wgmma has
//   static constexpr bool kDilated;     some dilation is not 1
//   static constexpr bool kAdditional;  there are additional keys
//   static constexpr bool kSigned;      scale is not positive
//   using Element;                      float16 or bfloat16
// };
#include "cuneigh/layout.cuh"
#include "cuneigh/types.cuh"
#include "cuneigh/warp_softmax.cuh"
#include "hopper/barrier.cuh"
#include "hopper/mask.cuh"
#include "hopper/tile.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace cuneigh::hopper {

// Registers of a thread: those of all warpgroups together are the 65536 of a multiprocessor.
template <typename Plan>
constexpr int kConsumerRegisters = Plan::kWarpgroups == 2  ? 232
                                   : Plan::kValueDim <= 64 ? 152
                                                           : 160;
template <typename Plan>
constexpr int kProducerRegisters = Plan::kWarpgroups == 2  ? 40
                                   : Plan::kValueDim <= 64 ? 56
                                                           : 32;

template <typename Plan>
struct ForwardArguments {
  View<typename Plan::Element, Plan::kRank> output;
  View<float, Plan::kRank> lse;  // may be null
  unsigned* taken;               // tiles beyond the first of each block, 0 before the launch
};

constexpr int lines_of(int dim) { return (dim + kLineElements - 1) / kLineElements; }

// A box of keys: its first token, or the first of the additional keys.
template <int kRank>
struct KeyBox {
  int batch, head, token[kRank];
  bool is_additional;
};

template <typename Plan>
struct ForwardSmem {
  static constexpr int kQueryLines = lines_of(Plan::kHeadDim);
  static constexpr int kValueLines = lines_of(Plan::kValueDim);
  using Line = typename Plan::Element[kLineElements];

  // [slots][lines of a row][rows][64]; every [rows][64] begins at a multiple of 1024 bytes
  Line query[Plan::kQuerySlots][kQueryLines][kRows];
  Line key[Plan::kStages][kQueryLines][Plan::kKeys];
  Line value[Plan::kStages][kValueLines][Plan::kKeys];
  QuadWords words[Plan::kStages][Plan::kWarpgroups * kMostCoordinates<Plan::kRank>];
  MaskTables<Plan::kRank, Plan::kWarpgroups> mask;
  Tile<Plan::kRank> tile[2];
  int visibility[Plan::kStages][Plan::kWarpgroups];
  HopperProblem<Plan::kRank> problem;  // for the producers, who have few registers
  KeyBox<Plan::kRank> last_keys;       // whose values are still to be loaded
  Barrier tile_full[2], tile_empty[2];
  Barrier query_full[Plan::kQuerySlots], query_empty[Plan::kQuerySlots];
  Barrier key_full[Plan::kStages], key_empty[Plan::kStages];
  Barrier value_full[Plan::kStages], value_empty[Plan::kStages];
};

// Coordinates for TMA of the box that begins at `token`, in the order of `Folding`.
template <int kRank>
struct Coordinates {
  int c[5];
  __device__ Coordinates(const Folding& folding, int batch, int head, const int (&token)[kRank]) {
    c[0] = head * folding.dim;
    c[1] = token[kRank - 1];
    if constexpr (kRank == 3) {
      c[2] = token[1];
      c[3] = token[0];
      c[4] = batch * folding.batch + head * folding.outer;
    } else {
      c[2] = kRank == 2 ? token[0] : 0;
      c[3] = head;
      c[4] = batch;
    }
  }
};

struct Maps {
  const TensorMap &key, &value, &additional_keys, &additional_values;
};

// Calls visit(tile) for every tile of this block, as warp 1 announces them.
template <typename Plan, typename Visit>
__device__ void for_each_tile(ForwardSmem<Plan>& smem, Visit visit) {
  for (Ring<2> ring;; ring.advance()) {
    smem.tile_full[ring.slot()].wait(ring.parity());
    if (smem.tile[ring.slot()].boxes == kNoTile) break;
    visit(smem.tile[ring.slot()]);
    if (threadIdx.x % 32 == 0) smem.tile_empty[ring.slot()].arrive();
  }
}

// Loads a box of tokens into `lines`, of which `full` is the barrier.
template <int kRank, int kLines, int kTokens, typename Line>
__device__ void load_tokens(const TensorMap& map, Coordinates<kRank> at, const Pieces& pieces,
                            Line (&lines)[kLines][kTokens], Barrier& full) {
  full.arrive_and_expect(sizeof(lines));
#pragma unroll 1
  for (int piece = 0; piece < pieces.count; ++piece) {
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      load_box(shared_address(lines[line][piece * pieces.rows]), map, full, at.c);
      at.c[0] += kLineElements;
    }
    at.c[0] -= kLines * kLineElements;
    at.c[kRank] += pieces.tokens;  // the first token axis
  }
}

// Loads a box of keys or values.
template <int kRank, int kLines, int kKeys, typename Line>
__device__ void load_keys(const HopperProblem<kRank>& problem, const TensorMap& window,
                          const TensorMap& additional, const Folding& folding,
                          const KeyBox<kRank>& box, Line (&lines)[kLines][kKeys], Barrier& full) {
  if (box.is_additional)
    load_tokens<1>(additional, {{}, box.batch, box.head, {box.token[0]}}, {1, 0, 0}, lines, full);
  else
    load_tokens<kRank>(window, {folding, box.batch, box.head, box.token}, problem.key_pieces, lines,
                       full);
}

// Warp 0, of which one lane does it all: boxes of keys, and one box later their values.
template <typename Plan>
__device__ void load_keys_and_values(const Maps& maps, ForwardSmem<Plan>& smem) {
  constexpr int kRank = Plan::kRank;
  const auto& problem = smem.problem;
  Ring<Plan::kStages> keys, values;
  KeyBox<kRank>& last = smem.last_keys;
  bool has_last = false;
  auto load_values = [&] {
    smem.value_empty[values.slot()].wait(values.parity() ^ 1);
    load_keys(problem, maps.value, maps.additional_values, problem.value, last,
              smem.value[values.slot()], smem.value_full[values.slot()]);
    values.advance();
  };
  auto load = [&](const KeyBox<kRank>& box) {
    smem.key_empty[keys.slot()].wait(keys.parity() ^ 1);
    load_keys(problem, maps.key, maps.additional_keys, problem.key, box, smem.key[keys.slot()],
              smem.key_full[keys.slot()]);
    keys.advance();
    if (has_last) load_values();
    last = box;
    has_last = true;
  };
  for_each_tile(smem, [&](const Tile<kRank>& tile) {
    int first[kRank];
    for_each_box(problem, tile, first, [&](const int (&first)[kRank]) {
      KeyBox<kRank> box = {tile.batch, tile.kv_head, {}, false};
#pragma unroll
      for (int r = 0; r < kRank; ++r)
        box.token[r] =
            axis_of<Plan>(problem, r).token({tile.first[r].group, tile.keys[r].begin + first[r]});
      load(box);
    });
    if (Plan::kAdditional)
#pragma unroll 1
      for (int i = 0; i < problem.additional; i += Plan::kKeys)
        load({tile.batch, tile.kv_head, {i}, true});
  });
  if (has_last) load_values();
}

// Warp 1, of which one lane does it all: announces the tiles of this block and loads their queries.
template <typename Plan>
__device__ void begin_tiles(const TensorMap& map, unsigned* taken, ForwardSmem<Plan>& smem) {
  constexpr int kRank = Plan::kRank;
  const auto& problem = smem.problem;
  Ring<2> tiles;
  Ring<Plan::kQuerySlots> queries;
  for (int number = blockIdx.x, next;; number = next, tiles.advance()) {
    smem.tile_empty[tiles.slot()].wait(tiles.parity() ^ 1);
    Tile<kRank>& tile = smem.tile[tiles.slot()];
    const bool end = number >= problem.block_tiles;
    if (end) {
      tile.boxes = kNoTile;
    } else {
      next = taken ? gridDim.x + atomicAdd(taken, 1u) : number + gridDim.x;
      find_tile<Plan>(problem, number, tile);
    }
    smem.tile_full[tiles.slot()].arrive();
    if (end) break;
#pragma unroll 1
    for (int w = 0; w < Plan::kWarpgroups; ++w, queries.advance()) {
      int token[kRank];
#pragma unroll
      for (int r = 0; r < kRank; ++r)
        token[r] =
            axis_of<Plan>(problem, r)
                .token({tile.first[r].group, tile.first[r].index + problem.warpgroup[w][1 + r]});
      Coordinates<kRank> at(problem.query, tile.batch, tile.head + problem.warpgroup[w][0], token);
      smem.query_empty[queries.slot()].wait(queries.parity() ^ 1);
      load_tokens(map, at, problem.query_pieces, smem.query[queries.slot()],
                  smem.query_full[queries.slot()]);
    }
  }
}

// Warps 2 and 3, as one team of 64 lanes: what every warpgroup does with every box of keys.
template <typename Plan>
__device__ void make_masks(ForwardSmem<Plan>& smem, int lane) {
  constexpr int kRank = Plan::kRank, kWarpgroups = Plan::kWarpgroups;
  const auto& problem = smem.problem;
  Ring<Plan::kStages> ring;
  // Lane w of each warp says what warpgroup w does; the other lanes repeat it
  const int w = smaller(lane % 32, kWarpgroups - 1);
  auto publish = [&](Visibility visibility, auto make) {
    smem.key_empty[ring.slot()].wait(ring.parity() ^ 1);
    smem.visibility[ring.slot()][w] = visibility;
    if (__any_sync(0xffffffffu, visibility == kPartial)) make(smem.words[ring.slot()]);
    __syncwarp();
    if (lane % 32 == 0) smem.key_full[ring.slot()].arrive();
    ring.advance();
  };
  for_each_tile(smem, [&](const Tile<kRank>& tile) {
    look_up<Plan>(problem, tile, lane, w, smem.mask);
    int first[kRank];
    for_each_box(problem, tile, first, [&](const int (&first)[kRank]) {
      publish(visibility_of(problem, smem.mask, lane, first),
              [&](QuadWords* words) { make_words(problem, smem.mask, lane, first, words); });
    });
    if (Plan::kAdditional) {
      bool none = false;
#pragma unroll
      for (int r = 0; r < kRank; ++r) none |= smem.mask.windows[r][lane].misses(0, 1 << 30);
#pragma unroll 1
      for (int left = problem.additional; left > 0; left -= Plan::kKeys) {
        const Visibility visibility = none ? kNone : left >= Plan::kKeys ? kAll : kPartial;
        publish(visibility, [&](QuadWords* words) {
          for (int i = lane; i < 4 * kWarpgroups * problem.coordinates; i += 64)
            words[i / 4].word[i % 4] = first_keys(left, i % 4);
        });
      }
    }
  });
}

// The token of a row of warpgroup `w`; false if the tile leaves it out, or an axis ends before.
template <typename Plan>
__device__ bool token_of_row(const HopperProblem<Plan::kRank>& problem,
                             const Tile<Plan::kRank>& tile, int w, int row,
                             int (&token)[Plan::kRank]) {
  bool exists = tile.active >> w & 1;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const int inside = row % problem.query_box[r];
    row /= problem.query_box[r];
    const int first = tile.first[r].index + problem.warpgroup[w][1 + r];
    const GroupIndex place = {tile.first[r].group, first + inside};
    exists &= place.index < axis.group_length(place.group);
    token[r] = axis.token(place);
  }
  return exists;
}

// Writes the rows of O that the lanes of a quad share, 16 bytes a lane.
template <typename Element, int kTiles>
__device__ void store_row(const float (&output)[kTiles][4], int half, float factor, int quad,
                          Element* row, int dim, bool exists) {
#pragma unroll
  for (int chunk = 0; chunk < kTiles; chunk += 4) {  // of 8 columns
    // Word i of this lane is columns 8 (chunk + i) + 2 quad and the next: 4 x 4 words are
    // transposed within the quad, so that this lane gets the four words of chunk + quad
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] = pack(output[chunk + i][2 * half] * factor, output[chunk + i][2 * half + 1] * factor,
                     Element());
    const bool odd = quad & 1, high = quad & 2;
    unsigned a = __shfl_xor_sync(0xffffffffu, odd ? word[0] : word[1], 1);
    unsigned b = __shfl_xor_sync(0xffffffffu, odd ? word[2] : word[3], 1);
    if (odd)
      word[0] = a, word[2] = b;
    else
      word[1] = a, word[3] = b;
    a = __shfl_xor_sync(0xffffffffu, high ? word[0] : word[2], 2);
    b = __shfl_xor_sync(0xffffffffu, high ? word[1] : word[3], 2);
    if (high)
      word[0] = a, word[1] = b;
    else
      word[2] = a, word[3] = b;
    const int column = 8 * (chunk + quad);
    if (exists && column < dim)
      *reinterpret_cast<uint4*>(row + column) = make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// A consumer: warpgroup `w`, all of its 128 threads.
template <typename Plan>
__device__ void attend(const HopperProblem<Plan::kRank>& problem,
                       const ForwardArguments<Plan>& arguments, ForwardSmem<Plan>& smem, int w) {
  using Element = typename Plan::Element;
  using Smem = ForwardSmem<Plan>;
  using LogitProduct = Wgmma<Plan::kKeys, Element>;
  using ValueProduct = Wgmma<Plan::kValueDim, Element>;
  constexpr int kSteps = Plan::kHeadDim / 16, kKeySteps = Plan::kKeys / 16;
  constexpr int kSixteenBytes = 16;
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // this thread's are row and row + 8
  const Descriptor queries = rows_descriptor(shared_address(smem.query));
  const Descriptor keys_at = rows_descriptor(shared_address(smem.key));
  const Descriptor values_at =
      columns_descriptor(shared_address(smem.value), sizeof(smem.value[0][0]));

  Ring<Plan::kQuerySlots> query_ring;
  query_ring.advance(w);
  Ring<Plan::kStages> ring;
  for (Ring<2> tile_ring;; tile_ring.advance()) {
    smem.tile_full[tile_ring.slot()].wait(tile_ring.parity());
    const Tile<Plan::kRank>& tile = smem.tile[tile_ring.slot()];
    int boxes = tile.boxes;
    if (boxes == kNoTile) break;
    smem.query_full[query_ring.slot()].wait(query_ring.parity());
    float output[1][Plan::kValueDim / 8][4] = {};  // O: [64, kValueDim], of which 2 rows a thread
    WarpSoftmax<1> softmax;

    auto release = [&](Barrier& empty) {
      if (lane == 0) empty.arrive();
    };
    // Boxes of which no query of this warpgroup sees anything. (A `continue` in the loop of the
    // products would give the compiler two versions of O, and serialize them.)
    auto pass_over = [&] {
      for (; boxes > 0; --boxes, ring.advance()) {
        smem.key_full[ring.slot()].wait(ring.parity());
        if (smem.visibility[ring.slot()][w] != kNone) break;
        smem.value_full[ring.slot()].wait(ring.parity());
        release(smem.key_empty[ring.slot()]);
        release(smem.value_empty[ring.slot()]);
      }
    };
    while (true) {
      pass_over();
      if (boxes == 0) break;
      const unsigned stage = ring.slot();
      // S = Q K^T, [64, kKeys]
      float logit[1][Plan::kKeys / 8][4];
      fence_registers();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int line = step / 4, inside = step % 4 * 32;
        const Descriptor left = queries + (query_ring.slot() * sizeof(smem.query[0]) +
                                           line * sizeof(smem.query[0][0]) + inside) /
                                              kSixteenBytes;
        const Descriptor right =
            keys_at +
            (stage * sizeof(smem.key[0]) + line * sizeof(smem.key[0][0]) + inside) / kSixteenBytes;
        if (step == 0)
          LogitProduct::template shared<false>(logit[0], left, right);
        else
          LogitProduct::template shared<true>(logit[0], left, right);
      }
      commit_products();
      wait_for_products<0>();
      hold(logit[0]);
      if (Plan::kSigned) {
#pragma unroll
        for (auto& four : logit[0])
#pragma unroll
          for (float& x : four) x *= problem.sign;
      }
      if (smem.visibility[stage][w] == kPartial) {
        const QuadWords* words = smem.words[stage] + w * problem.coordinates;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          unsigned word = ~0u;
#pragma unroll
          for (int r = 0; r < Plan::kRank; ++r)
            word &= words[smem.mask.number[r][row + 8 * half]].word[quad];
          hide(logit[0], half, word);
        }
      }
      release(smem.key_empty[stage]);
      softmax.rescale(logit, problem.scale, output);

      // O += P V, in halves: P [64, kKeys / 2], V [kKeys / 2, kValueDim]
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        constexpr int kPart = kKeySteps / 2;
        unsigned weight[kPart][4];
        softmax.exponentiate(logit, problem.scale, part * kKeySteps, (part + 1) * kKeySteps);
#pragma unroll
        for (int step = 0; step < kPart; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const auto& tile = logit[0][2 * (part * kPart + step) + i / 2];
            weight[step][i] = pack(tile[2 * (i % 2)], tile[2 * (i % 2) + 1], Element());
          }
        if (part == 0) smem.value_full[stage].wait(ring.parity());
        fence_registers();
#pragma unroll
        for (int step = 0; step < kPart; ++step)
          ValueProduct::registers(output[0], weight[step],
                                  values_at + (stage * sizeof(smem.value[0]) +
                                               (part * kPart + step) * 16 * kLineBytes) /
                                                  kSixteenBytes);
        commit_products();
      }
      wait_for_products<0>();
      hold(output[0]);
      release(smem.value_empty[stage]);
      --boxes;
      ring.advance();
    }

    release(smem.query_empty[query_ring.slot()]);
    query_ring.advance(Plan::kWarpgroups);
    const int head = tile.head + problem.warpgroup[w][0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int token[Plan::kRank];
      const bool exists = token_of_row<Plan>(problem, tile, w, row + 8 * half, token);
      const float sum = softmax.sum(0, half);
      store_row(output[0], half, softmax.normalizer(sum), quad,
                arguments.output.at(tile.batch, token, head), problem.value_dim, exists);
      if (arguments.lse.data && quad == 0 && exists)
        *arguments.lse.at(tile.batch, token, head) = softmax.lse(0, half, sum);
    }
    __syncwarp();
    release(smem.tile_empty[tile_ring.slot()]);
  }
}

template <typename Plan>
__global__ void __launch_bounds__(128 * (Plan::kWarpgroups + 1), 1)
    forward(const HopperProblem<Plan::kRank> problem, const ForwardArguments<Plan> arguments,
            const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
            const __grid_constant__ TensorMap value,
            const __grid_constant__ TensorMap additional_keys,
            const __grid_constant__ TensorMap additional_values) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& smem = *reinterpret_cast<ForwardSmem<Plan>*>(memory);
  static_assert(sizeof(ForwardSmem<Plan>) == Plan::kSharedBytes,
                "'shared_bytes' in cuneigh/_backends/hopper/plan.py counts what ForwardSmem holds");

  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(3 + 4 * Plan::kWarpgroups);  // warps 0, 2 and 3, and the consumers
    }
    for (int i = 0; i < Plan::kQuerySlots; ++i) {
      smem.query_full[i].init(1);
      smem.query_empty[i].init(4);  // warps of the warpgroup
    }
    for (int i = 0; i < Plan::kStages; ++i) {
      smem.key_full[i].init(1 + 2);  // the loader, and the warps that make masks
      smem.value_full[i].init(1);
      smem.key_empty[i].init(4 * Plan::kWarpgroups);
      smem.value_empty[i].init(4 * Plan::kWarpgroups);
    }
    fence_barrier_init();
  }
  if (threadIdx.x == 32) smem.problem = problem;
  fill_mask_tables(problem, smem.mask, Plan::kKeys);
  __syncthreads();

  // Through a shuffle, the compiler knows that all threads of a warp are of the same warpgroup
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    set_registers<false, kProducerRegisters<Plan>>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= 2)
      make_masks(smem, threadIdx.x - 64);
    else if (lane != 0)
      return;
    else if (warp == 0)
      load_keys_and_values({key, value, additional_keys, additional_values}, smem);
    else
      begin_tiles(query, arguments.taken, smem);
  } else {
    set_registers<true, kConsumerRegisters<Plan>>();
    attend(problem, arguments, smem, warpgroup - 1);
  }
}

}  // namespace cuneigh::hopper
