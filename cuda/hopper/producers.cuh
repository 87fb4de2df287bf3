// The warps that feed the consumers: they load rows and columns, and make masks. If kSums they also
// take what consumers have made to sums in memory. `produce` says which warp does what.
#pragma once

#include "cuneigh/layout.cuh"
#include "hopper/sums.cuh"

namespace cuneigh::hopper {

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

// The tensor maps of rows and columns; shared.cuh says what qk and vo are.
struct Maps {
  const TensorMap &row_qk, &row_vo, &column_qk, &column_vo, &additional_keys, &additional_values;
  const Maps* tangents = nullptr;  // those of the tangents, if kTangents
};

// Loads a box of tokens into `lines` [kLines][kTokens] of 64 elements; `full` is their barrier.
template <int kLines, int kRank, int kTokens, typename Line>
__device__ void load_tokens(const TensorMap& map, Coordinates<kRank> at, const Pieces& pieces,
                            Line (*lines)[kTokens], Barrier& full) {
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

// The batch entry of a box of which a mask hides all keys, so that it is not loaded.
constexpr int kNotLoaded = -1;

// Those of the qk or of the vo of columns.
struct ColumnMaps {
  const TensorMap &window, &additional;
};

// Loads the qk or the vo of a box of columns into `lines` [kLines][kColumns] of 64 elements. If
// kTangents half of them are of the tangent.
template <bool kMasked, bool kTangents, int kRank, int kLines, int kColumns, typename Line>
__device__ void load_columns(const HopperProblem<kRank>& problem, const ColumnMaps& maps,
                             const ColumnMaps& tangents, const Folding& folding,
                             const ColumnBox<kRank>& box, Line (&lines)[kLines][kColumns],
                             Barrier& full) {
  if constexpr (kMasked)
    if (box.batch == kNotLoaded) return full.arrive();
  full.arrive_and_expect(sizeof(lines));
  constexpr int kOfArray = kTangents ? kLines / 2 : kLines;
  auto load = [&](const ColumnMaps& of, Line(*lines)[kColumns]) {
    if (box.is_additional)
      load_tokens<kOfArray, 1>(of.additional, {{}, box.batch, box.head, {box.token[0]}}, {1, 0, 0},
                               lines, full);
    else
      load_tokens<kOfArray, kRank>(of.window, {folding, box.batch, box.head, box.token},
                                   problem.column_pieces, lines, full);
  };
  load(maps, lines);
  if constexpr (kTangents) load(tangents, lines + kOfArray);
}

// Warp 0, of which one lane does it all: boxes of columns. In the forward pass a consumer needs the
// values of a box long after its keys; they are loaded after the keys of the next box.
template <typename Plan>
__device__ void load_boxes(const Maps& maps, const HiddenKeys<Plan>& mask,
                           SharedMemory<Plan>& smem) {
  constexpr int kRank = Plan::kRank;
  const auto& problem = smem.problem;
  const Maps& tangents = Plan::kTangents ? *maps.tangents : maps;
  Ring<Plan::kStages> qk, vo;
  ColumnBox<kRank>& last = smem.last_box;
  bool has_last = false;
  auto load_vo = [&](const ColumnBox<kRank>& box) {
    smem.vo_empty[vo.slot()].wait(vo.parity() ^ 1);
    Barrier* full = &smem.vo_full[vo.slot()];
    if constexpr (kMaskedColumns<Plan>) {
      if (box.has_holes)
        full = &smem.vo_came(vo.slot());
      else  // for the makers of masks, who have nothing to do; one arrival is `load_columns`'
        full->arrive(kMaskWarps * kArrivingLanes - 1);
    }
    load_columns<kMaskedColumns<Plan>, Plan::kTangents>(
        problem, {maps.column_vo, maps.additional_values},
        {tangents.column_vo, tangents.additional_values}, problem.column_vo, box,
        smem.column_vo[vo.slot()], *full);
    vo.advance();
  };
  auto load = [&](const ColumnBox<kRank>& box) {
    smem.qk_empty[qk.slot()].wait(qk.parity() ^ 1);
    load_columns<kMaskedColumns<Plan>, Plan::kTangents>(
        problem, {maps.column_qk, maps.additional_keys},
        {tangents.column_qk, tangents.additional_keys}, problem.column_qk, box,
        smem.column_qk[qk.slot()], smem.qk_full[qk.slot()]);
    qk.advance();
    if (Plan::kBackward || Plan::kTangents) {
      load_vo(box);
    } else {
      if (has_last) load_vo(last);
      last = box;
      has_last = true;
    }
  };
  for_each_tile<false>(smem, [&](const AnnouncedTile<Plan>& tile) {
    const QuadWords* seen = tile.seen(mask);
    for_each_box<Plan>(problem, tile, [&](int head, const int (&first)[kRank]) {
      ColumnBox<kRank> box = {tile.batch, head, {}, false, false};
      if constexpr (kMaskedColumns<Plan>) {
        if (seen->none()) box.batch = kNotLoaded;
        box.has_holes = (seen++)->some();
      }
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        box.token[r] =
            axis_of<Plan>(problem, r)
                .token({column_group<Plan>(problem, tile, r), tile.columns[r].begin + first[r]});
      }
      load(box);
    });
    if (Plan::kAdditional)
#pragma unroll 1
      for (int i = 0; i < problem.additional; i += Plan::kColumns)
        load({tile.batch, tile.column_head, {i}, true, false});
    // Consumers need the last values of a tile before a later one can be announced, while keys of
    // the next box may be those of a later tile: rows of parts may see no column
    if (Axis::kIsPart && tile.boxes == 0 && has_last) {
      load_vo(last);
      has_last = false;
    }
  });
  if (has_last) load_vo(last);
}

// Finds tile `number` and announces it, or that there is none. `rows` is the place of its rows,
// which matters only where warpgroups change slots.
template <typename Plan>
__device__ void announce(const HiddenKeys<Plan>& mask, SharedMemory<Plan>& smem, Ring<2> tiles,
                         Ring<Plan::kRowSlots> rows, int number) {
  const auto& problem = smem.problem;
  smem.tile_empty[tiles.slot()].wait(tiles.parity() ^ 1);
  AnnouncedTile<Plan>& tile = smem.tile[tiles.slot()];
  tile.position = tiles.position;
  if (number >= problem.block_tiles) {
    tile.boxes = kNoTile;
  } else {
    tile.place(mask, find_tile<Plan>(problem, number, tile));
    if constexpr (Plan::kKeyMask && Plan::kRowsAreKeys && !Plan::kSums) {
      bool seen = false;
#pragma unroll 1
      for (int w = 0; w < Plan::kWarpgroups && !seen; ++w)
        seen = tile.active >> w & 1 &&
               any_row_is_seen<Plan>(problem, mask, tile, w, mask.key_mask.at(tile.batch, 0));
      if (!seen) {
        tile.columns[0].end = tile.columns[0].begin;
        tile.boxes = 0;
      }
    }
  }
  // The last tile's rows must have come before this one is announced. A slot may have been another
  // warpgroup's there: to one that is ahead, rows still on their way would look like its own
  if (Plan::kRowSlots % Plan::kWarpgroups != 0) {
    Ring<Plan::kRowSlots> last = rows;
#pragma unroll 1
    for (int w = 0; w < Plan::kWarpgroups; ++w) {
      last = last.before();
      smem.row_full[last.slot()].wait(last.parity());
    }
  }
  smem.tile_full[tiles.slot()].arrive();
}

// Loads the rows of a tile, those of the first warpgroup to the place `rows`.
template <typename Plan>
__device__ void load_rows(const Maps& maps, const AnnouncedTile<Plan>& tile,
                          SharedMemory<Plan>& smem, Ring<Plan::kRowSlots>& rows) {
  constexpr int kRank = Plan::kRank;
  using Smem = SharedMemory<Plan>;
  const auto& problem = smem.problem;
#pragma unroll 1
  for (int w = 0; w < Plan::kWarpgroups; ++w, rows.advance()) {
    int token[kRank];
#pragma unroll
    for (int r = 0; r < kRank; ++r)
      token[r] =
          axis_of<Plan>(problem, r)
              .token({tile.first[r].group, tile.first[r].index + problem.warpgroup[w][1 + r]});
    const int head = tile.head + problem.warpgroup[w][0];
    smem.row_empty[rows.slot()].wait(rows.parity() ^ 1);
    auto& lines = smem.row[rows.slot()];
    Barrier& full = smem.row_full[rows.slot()];
    full.arrive_and_expect(sizeof(lines));
    load_tokens<Smem::kQkLines, kRank>(maps.row_qk, {problem.row_qk, tile.batch, head, token},
                                       problem.row_pieces, lines, full);
    if constexpr (Plan::kTangents)
      load_tokens<Smem::kQkLines, kRank>(maps.tangents->row_qk,
                                         {problem.row_qk, tile.batch, head, token},
                                         problem.row_pieces, lines + Smem::kQkLines, full);
    if constexpr (Plan::kBackward)
      load_tokens<Smem::kVoLines, kRank>(maps.row_vo, {problem.row_vo, tile.batch, head, token},
                                         problem.row_pieces, lines + Smem::kQkLines, full);
  }
}

// Announces the tiles of this block and loads their rows, by one lane. `taken` counts tiles beyond
// the first of each block; it is null if there are none.
template <typename Plan>
__device__ void begin_tiles(const Maps& maps, const HiddenKeys<Plan>& mask, unsigned* taken,
                            SharedMemory<Plan>& smem) {
  Ring<2> tiles;
  Ring<Plan::kRowSlots> rows;
  for (int number = blockIdx.x;; tiles.advance()) {
    announce(mask, smem, tiles, rows, number);
    AnnouncedTile<Plan>& tile = smem.tile[tiles.slot()];
    if (tile.boxes == kNoTile) break;
    // Kept in shared memory while rows are loaded: registers are few
    tile.next = gridDim.x + (taken ? atomicAdd(taken, 1u) : number);
    load_rows(maps, tile, smem, rows);
    number = tile.next;
  }
}

// If kSums: does the same, and loads the boxes of each tile, by one lane, so that another warp can
// be spared for something else. `taken` counts all tiles. Between two tiles consumers wait for what
// is loaded. So a tile is found while boxes of the one before are still to be loaded, and its first
// box is loaded before its rows: for that there is room earlier, while rows of the tile before are
// needed until its last dQ is made. (A tile has a box at least: every key lies in some window.)
template <typename Plan>
__device__ void begin_tiles_and_load_boxes(const Maps& maps, const HiddenKeys<Plan>& mask,
                                           unsigned* taken, SharedMemory<Plan>& smem) {
  constexpr int kRank = Plan::kRank;
  const auto& problem = smem.problem;
  Ring<Plan::kRowSlots> rows;
  Ring<Plan::kStages> boxes;
  announce(mask, smem, {}, rows, smem.first_number);
  for (Ring<2> tiles; smem.tile[tiles.slot()].boxes != kNoTile; tiles.advance()) {
    const AnnouncedTile<Plan>& tile = smem.tile[tiles.slot()];
    int left = tile.boxes;
    for_each_box<Plan>(problem, tile, [&](int head, const int (&first)[kRank]) {
      ColumnBox<kRank> box = {tile.batch, head, {}, false, false};
#pragma unroll
      for (int r = 0; r < kRank; ++r) box.token[r] = tile.columns[r].begin + first[r];
      const unsigned stage = boxes.slot();
      smem.qk_empty[stage].wait(boxes.parity() ^ 1);
      load_columns<false, false>(problem, {maps.column_qk, maps.additional_keys},
                                 {maps.column_qk, maps.additional_keys}, problem.column_qk, box,
                                 smem.column_qk[stage], smem.qk_full[stage]);
      smem.vo_empty[stage].wait(boxes.parity() ^ 1);
      load_columns<false, false>(problem, {maps.column_vo, maps.additional_values},
                                 {maps.column_vo, maps.additional_values}, problem.column_vo, box,
                                 smem.column_vo[stage], smem.vo_full[stage]);
      boxes.advance();
      if (left == tile.boxes) load_rows(maps, tile, smem, rows);
      // Some boxes before the end, but behind the first, which would wait for the tile before
      if (left == smaller(Plan::kStages + 1, tile.boxes))
        announce(mask, smem, {tile.position + 1}, rows, atomicAdd(taken, 1u));
      --left;
    });
    smem.tile_empty[tiles.slot()].arrive();
  }
}

// What is known of queries beside their vectors, and of one of them.
template <typename Plan, bool kSums = Plan::kSums>
struct OfQueries {
  View<const float2, Plan::kRank> statistics;  // {lse * log2(e), delta}
};
template <typename Plan>
struct OfQueries<Plan, true> {
  View<const float2, Plan::kRank> statistics;
  View<float, Plan::kRank> units;  // of dQ (sums/units.cuh)
};
struct OfQuery {
  float2 statistics;
  float units;
};

// The numbers of the query that is column number `column` of a box; of one that does not exist,
// numbers that make its weights 0.
template <typename Plan>
__device__ OfQuery of_query(const HopperProblem<Plan::kRank>& problem,
                            const OfQueries<Plan>& queries, const Places<Plan>& place,
                            const Tile<Plan::kRank>& tile, int head,
                            const int (&first)[Plan::kRank], int column) {
  int token[Plan::kRank];
  bool exists = true;
#pragma unroll
  for (int r = Plan::kRank - 1; r >= 0; --r) {
    const Axis axis = axis_of<Plan>(problem, r);
    const int group = column_group<Plan>(problem, tile, r);
    const int index = tile.columns[r].begin + first[r] + place.along(problem, r, column);
    exists &= static_cast<unsigned>(index) < static_cast<unsigned>(axis.group_length(group));
    token[r] = axis.token({group, index});
  }
  if (!exists) return {{infinity<float>(), 0}, 1};
  OfQuery query = {*queries.statistics.at(tile.batch, token, head), 1};
  if constexpr (Plan::kSums) query.units = *queries.units.at(tile.batch, token, head);
  return query;
}

// Warps 2 and 3, as one team of 64 lanes: what every warpgroup does with every box of columns, and
// the numbers of columns that are queries.
template <typename Plan>
__device__ void make_masks(const OfQueries<Plan>& queries, const HiddenKeys<Plan>& mask,
                           SharedMemory<Plan>& smem) {
  constexpr int kRank = Plan::kRank, kWarpgroups = Plan::kWarpgroups, kLanes = kMaskLanes;
  const auto& problem = smem.problem;
  Ring<Plan::kStages> ring;
  const auto lane = lane_of_team;
  Ring<Plan::kRowSlots> rows;
  Ring<kUnitSlots> units;
  Cleaner<Plan> cleaner;
  auto wait = [&] {
    cleaner.clean(smem, ring, lane());
    smem.qk_empty[ring.slot()].wait(ring.parity() ^ 1);
  };
  auto publish = [&](Visibility visibility, auto mark) {
    wait();
    if (lane() < kWarpgroups) smem.visibility[ring.slot()][lane()] = visibility;
    const bool has_holes = kMaskedColumns<Plan> && visibility == kPartialHoles;
    if (__any_sync(0xffffffffu, visibility == kPartial || has_holes)) mark(ring.slot());
    smem.qk_full[ring.slot()].arrive_as_warp();
    ring.advance();
  };
  for_each_tile<true>(smem, [&](const AnnouncedTile<Plan>& tile) {
    const QuadWords* next = tile.seen(mask);
    look_up<Plan, kLanes>(problem, tile, smem.mask);
    if constexpr (Plan::kSums && Plan::kKeyMask) {
      hide_rows(mask, tile, smem, rows);
      rows.advance(kWarpgroups);
    }
    if (Axis::kIsPart && tile.boxes == 0) cleaner.clean(smem, ring, lane());
    for_each_box<Plan>(problem, tile, [&](int head, const int (&first)[kRank]) {
      if constexpr (Plan::kRowsAreKeys) {
        static_assert(Plan::kColumns % kLanes == 0, "every lane has as many columns");
        // One is read from memory while the box before is worked on; registers are few
        const auto read = [&](int i) {
          return of_query(problem, queries, smem.mask.place, tile, head, first,
                          lane() + i * kLanes);
        };
        const auto write = [&](int i, OfQuery query) {
          smem.statistics[ring.slot()].set(lane() + i * kLanes, query.statistics);
          if constexpr (Plan::kSums) smem.units[units.slot()][lane() + i * kLanes] = query.units;
        };
        const OfQuery mine = read(0);
        smem.qk_empty[ring.slot()].wait(ring.parity() ^ 1);
        write(0, mine);
#pragma unroll
        for (int i = 1; i < Plan::kColumns / kLanes; ++i) write(i, read(i));
        units.advance();
      }
      Visibility visibility = visibility_of(problem, smem.mask, lane(), first);
      const auto mark_rows = [&](unsigned stage) {
        mark_visible<kLanes>(problem, tile, smem.mask, stage, lane(), first);
      };
      if constexpr (kMaskedColumns<Plan>) {
        const QuadWords seen = *next++;
        wait();  // while they arrive
        if (seen.none()) visibility = kNone;
        if (visibility != kNone && !seen.all())
          visibility = visibility == kAll ? kHoles : kPartialHoles;
        if (lane() == 0) smem.mask.seen(ring.slot()) = seen;
        publish(visibility, mark_rows);
        if (seen.some()) cleaner.expect(seen, lane());
      } else {
        publish(visibility, mark_rows);
      }
    });
    if constexpr (Plan::kAdditional) {
      bool none = false;
#pragma unroll
      for (int r = 0; r < kRank; ++r)
        none |= Axis::kIsPart ? smem.mask.windows[r][lane()].any.end < 0
                              : smem.mask.windows[r][lane()].misses(0, 1 << 30);
#pragma unroll 1
      for (int left = problem.additional; left > 0; left -= Plan::kColumns) {
        const Visibility visibility = none ? kNone : left >= Plan::kColumns ? kAll : kPartial;
        publish(visibility, [&](unsigned stage) {
          QuadWords* words = smem.mask.words[stage];
          for (int i = lane(); i < 4 * kWarpgroups * problem.coordinates; i += kLanes)
            words[i / 4].word[i % 4] = first_columns(left, i % 4);
        });
      }
    }
  });
  cleaner.clean(smem, ring, lane());
}

// A producer: one of the four warps of the first warpgroup.
//
//   warp | otherwise                     | if kSums
//   0    | loads boxes                   | announces tiles, loads their rows and boxes
//   1    | announces tiles, loads rows   | adds to the sums
//   2, 3 | make masks, as one team       | likewise
//
// `queries` are read if rows are keys, `sums` if kSums.
template <typename Plan>
__device__ void produce(const Maps& maps, const OfQueries<Plan>& queries,
                        const HiddenKeys<Plan>& mask, const Sums& sums, unsigned* taken,
                        SharedMemory<Plan>& smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= 2) {
    make_masks(queries, mask, smem);
  } else if (Plan::kSums && warp == 1) {
    if constexpr (Plan::kSums) add_sums(sums, queries.units, smem);
  } else if (lane != 0) {
    return;
  } else if constexpr (Plan::kSums) {
    begin_tiles_and_load_boxes(maps, mask, taken, smem);
  } else if (warp == 0) {
    load_boxes(maps, mask, smem);
  } else {
    begin_tiles(maps, mask, taken, smem);
  }
}

}  // namespace cuneigh::hopper
