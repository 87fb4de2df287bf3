"""Every row meets every column that it sees once: a model of the walk of cuda/hopper."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from helpers.brute_force import visible_mask
from helpers.hopper import ALL_DIMS, H200, plans, supported
from hypothesis import assume, given
from hypothesis import strategies as st

from cuneigh._backends.hopper.choice import make_plan
from cuneigh._backends.hopper.launch import _record, divisor
from cuneigh._backends.hopper.plan import (
    LINE,
    ROWS,
    Division,
    count,
    count_seen_boxes,
    division,
    shared_bytes,
    sum_granules,
    ways,
)
from cuneigh._backends.hopper.tensor_maps import Folding
from cuneigh._gpu.boxes import GRANULE
from cuneigh._gpu.passes import BACKWARD

NO_FOLDINGS = [Folding(0, 0, 0)] * 4


def quotient(divisor, n):
    """`Divisor::quotient` of cuda/hopper/tile.cuh."""
    _, multiplier, shift = map(int, divisor)
    return n * multiplier >> 32 >> shift if multiplier else n


@given(value=st.integers(1, 2**31 - 1), data=st.data())
def test_divisors_are_exact(value, data):
    near = st.integers(0, (2**31 - 1) // value).flatmap(
        lambda times: st.integers(-2, 2).map(lambda off: times * value + off)
    )
    n = data.draw((near | st.integers(0, 2**31 - 1)).filter(lambda n: 0 <= n < 2**31))
    assert divisor(value)[0] == value
    assert all(0 <= word < 2**32 for word in divisor(value))
    assert quotient(divisor(value), n) == n // value


# tile.cuh


class Tile(NamedTuple):
    batch: int
    head: int
    column_heads: range
    active: int
    groups: tuple[int, ...]
    first: tuple[int, ...]
    columns: tuple[tuple[int, int], ...]


def box_begin(pass_, axis, box, size):
    """(dilation group, first index) of box number `box`: groups of a length lie side by side."""
    for group in range(axis.dilation):
        boxes = -(-pass_.group_length(axis, group) // size)
        if box < boxes:
            return group, box * size
        box -= boxes
    raise AssertionError("there are fewer boxes than tiles")


def share_of(columns, size, block, blocks):
    """The boxes of `size` columns that one of several blocks takes."""
    begin, end = columns
    boxes = -(-(end - begin) // size)
    first, last = (n * (boxes // blocks) + min(n, boxes % blocks) for n in (block, block + 1))
    return begin + first * size, min(end, begin + last * size)


def find_tile(problem, pass_, record, number, shares=1):
    """With several shares, `walk_of_block` of chunk.cuh."""
    number, block = divmod(number, shares)
    active, whole = -1, int(record["whole_tiles"])
    if number >= whole:
        divided = quotient(record["parts"], number - whole)
        active = int(record["active"][number - whole - divided * int(record["parts"]["divisor"])])
        number = whole + divided
    along: dict[int, tuple[int, int, tuple[int, int]]] = {}
    rest = int(record["tile_count"]) - 1 - number if record["longest_last"] else number
    axes = range(problem.rank) if record["first_axis_first"] else reversed(range(problem.rank))
    for r in axes:
        axis, size = problem.axes[r], int(record["tile_box"][r])
        outer = quotient(record["tiles"][r], rest)
        box = rest - outer * int(record["tiles"][r]["divisor"])
        group, index = box_begin(pass_, axis, box, size)
        rest = outer
        last = min(index + size, pass_.group_length(axis, group)) - 1
        window = pass_.window(axis)
        begin, end = window(index, group)[0], window(last, group)[1]
        if pass_.adds and r == problem.rank - 1:
            begin -= (begin + int(record["granule_lead"])) % GRANULE
        columns = share_of((begin, end), int(record["column_box"][r]), block, shares)
        along[r] = group, index, columns
    batch = quotient(record["head_groups"], rest)
    head = rest - batch * int(record["head_groups"]["divisor"])
    head *= int(record["heads_per_tile"])
    group_size = int(record["group_size"]["divisor"])
    if pass_.rows_are_keys:
        column_heads = range(head * group_size, (head + 1) * group_size)
    else:
        column_head = quotient(record["group_size"], head)
        column_heads = range(column_head, column_head + 1)
    groups, first, columns = zip(*(along[r] for r in range(problem.rank)), strict=True)
    return Tile(batch, head, column_heads, active, groups, first, columns)


def boxes_of(tile, column_box):
    """Where boxes of columns begin, counted from the first column of the tile on."""
    lengths = [
        -(-(end - begin) // size)
        for (begin, end), size in zip(tile.columns, column_box, strict=True)
    ]
    return np.array(list(np.ndindex(*lengths)), int).reshape(-1, len(column_box)) * column_box


# mask.cuh

NONE, PARTIAL, ALL = range(3)


def held(columns):
    """[4, columns / 4] The column of a logit, by the lane of its quad and the bit of its word."""
    quad, bit = np.ogrid[:4, : columns // 4]
    return 8 * (bit // 2) + 2 * quad + bit % 2


def prefixes(column_box):
    """For each axis [extent + 1, 4] words: the columns of a box before each coordinate."""
    columns = math.prod(column_box)
    bits = np.uint32(1) << np.arange(columns // 4, dtype=np.uint32)
    coordinates = np.unravel_index(held(columns), column_box)
    return [
        np.array([(bits * (along < before)).sum(-1, dtype=np.uint32) for before in range(size + 1)])
        for along, size in zip(coordinates, column_box, strict=True)
    ]


def windows_of(problem, pass_, record, tile, w):
    """For each axis the windows of a warpgroup's coordinates, their union and what all share.

    As (begin, end), counted from the first column of the tile on.
    """
    for r, axis in enumerate(problem.axes):
        group, base = tile.groups[r], tile.columns[r][0]
        first = tile.first[r] + int(record["warpgroup"][w][1 + r])
        size, length = int(record["row_box"][r]), pass_.group_length(axis, group)
        window, rows = pass_.window(axis), range(first, first + size)
        none = base, base
        windows = np.array([window(row, group) if row < length else none for row in rows]) - base
        if first < length and tile.active >> w & 1:
            low, high = windows[0], windows[min(size, length - first) - 1]
            hides = pass_.adds and first + size > length
            yield windows, (low[0], high[1]), (0, 0) if hides else (high[0], low[1])
        else:  # it has no rows
            yield windows, (0, 0), (0, 0)


def visit(pass_, windows, begins, record, words):
    """What a warpgroup does with a box of columns, and which of them its rows see [64, columns]."""
    row_box, column_box = record["row_box"].tolist(), record["column_box"].tolist()
    ends = begins + column_box
    none, covers = False, True
    shown = np.full((ROWS, 4), 0xFFFFFFFF, np.uint32)
    of_row = np.unravel_index(np.arange(ROWS), row_box)
    for r, (of_coordinates, (low, high), (begin, end)) in enumerate(windows):
        none |= begins[r] >= high or ends[r] <= low
        covers &= begin <= begins[r] and ends[r] <= end
        before, until = np.clip(of_coordinates - begins[r], 0, column_box[r]).T
        shown &= (words[r][until] & ~words[r][before])[of_row[r]]
    columns = math.prod(column_box)
    if none:
        return NONE, np.zeros((ROWS, columns), bool)
    if covers:
        return ALL, np.ones((ROWS, columns), bool)
    visible = np.zeros((ROWS, columns), bool)
    visible[:, held(columns)] = shown[:, :, None] >> np.arange(columns // 4, dtype=np.uint32) & 1
    return PARTIAL, visible


# The walk


def token_numbers(axes, lengths, groups, first, box):
    """Numbers in raster order of the tokens of a box; -1 where it lies past the end of an axis."""
    index = np.array(np.unravel_index(np.arange(math.prod(box)), box)).T + first
    dilations = [axis.dilation for axis in axes]
    tokens = (index * dilations + groups).T
    exists = ((tokens >= 0) & (tokens < np.array(lengths)[:, None])).all(0)
    clamped = np.clip(tokens, 0, np.array(lengths)[:, None] - 1)
    return np.where(exists, np.ravel_multi_index(tuple(clamped), lengths), -1)


@st.composite
def walks(draw):
    """A problem, a pass of it, a plan for that, and a division of the tiles."""
    ordinary = draw(st.booleans())
    operations = ("forward", "backward")
    problem = draw(supported(operations, most_tokens=300, dims=ALL_DIMS, ordinary=ordinary))
    pass_ = draw(st.sampled_from(draw(st.sampled_from(ways(problem)))))
    plan = draw(st.sampled_from(plans(problem, pass_)))
    heads = problem.batch * pass_.heads(problem) // plan.heads
    tiles = count(problem, plan, pass_).blocks * heads
    is_whole = pass_ == BACKWARD or plan.form.cluster
    parts = 1 if is_whole else draw(st.integers(1, plan.form.warpgroups))
    whole = tiles if parts == 1 else draw(st.integers(0, tiles))
    return problem, pass_, plan, Division(tiles, whole, parts, plan.form.cluster or 1)


@given(walk=walks())
def test_every_visible_pair_is_met_once(walk):
    problem, pass_, plan, work = walk
    record = _record(problem, plan, pass_, work, NO_FOLDINGS)[0]
    row_tokens, column_tokens = pass_.row_tokens(problem), pass_.column_tokens(problem)
    rows: Counter[tuple[int, int, int]] = Counter()
    met = np.zeros((plan.heads, math.prod(row_tokens), math.prod(column_tokens)), int)
    blocks = loads = visits = full = 0
    words, boxes_of_tiles = prefixes(plan.column_box), Counter()
    for number in range(work.blocks):
        tile = find_tile(problem, pass_, record, number, work.shares)
        is_first = (tile.batch, tile.head) == (0, 0)  # of the heads, which are all alike
        column_groups = [
            (axis.query_group if pass_.rows_are_keys else axis.key_group)(group)
            for axis, group in zip(problem.axes, tile.groups, strict=True)
        ]
        boxes = boxes_of(tile, plan.column_box) if is_first else []
        blocks, loads = blocks + is_first, loads + len(boxes)
        boxes_of_tiles[number // work.shares] += len(boxes)
        begin_of_tile = [begin for begin, _ in tile.columns]
        columns = [
            token_numbers(
                problem.axes, column_tokens, column_groups, begins + begin_of_tile, plan.column_box
            )
            for begins in boxes
        ]
        for w in range(plan.form.warpgroups):
            head, *offset = record["warpgroup"][w].tolist()
            first = np.add(tile.first, offset)
            row = token_numbers(problem.axes, row_tokens, tile.groups, first, plan.row_box)
            exists = (row >= 0) & bool(tile.active >> w & 1)
            if number % work.shares == 0:
                rows.update((tile.batch, tile.head + head, x) for x in row[exists].tolist())
            for column_head in tile.column_heads:
                pair = tile.head + head, column_head
                query_head, key_head = reversed(pair) if pass_.rows_are_keys else pair
                assert query_head // problem.group_size == key_head
            windows = list(windows_of(problem, pass_, record, tile, w)) if is_first else []
            for begins, column in zip(boxes, columns, strict=True):
                visibility, visible = visit(pass_, windows, begins, record, words)
                assert visibility != NONE or not plan.form.cluster
                visits += head == 0 and visibility != NONE
                full += head == 0 and visibility == ALL
                i, j = np.nonzero(visible & exists[:, None])
                assert (column[j] >= 0).all(), "a column past the end of an axis is shown"
                np.add.at(met[head], (row[i], column[j]), 1)
    mask = visible_mask(problem).T if pass_.rows_are_keys else visible_mask(problem)
    np.testing.assert_array_equal(met, np.broadcast_to(mask, met.shape))
    assert set(rows.values()) == {1}
    assert len(rows) == problem.batch * pass_.heads(problem) * math.prod(row_tokens)
    counts = count(problem, plan, pass_)
    if any(axis.is_part and axis.dilation > 1 for axis in problem.axes):
        return  # dilation groups of parts are not alike, as counts take them to be
    longest = max(boxes_of_tiles.values())
    assert (counts.visits, counts.full, counts.longest) == (visits, full, longest)
    if work.parts == 1:
        assert (counts.blocks * work.shares, counts.loads) == (blocks, loads)


# seen.cuh and seen.cu


def tile_at(record, place):
    """`tile_at` of seen.cu: the number of the first of the tiles at a place."""
    tiles = math.prod(record["tiles"]["divisor"].tolist())
    tile = place // tiles * tiles * int(record["head_groups"]["divisor"]) + place % tiles
    if record["longest_last"]:
        tile = int(record["tile_count"]) - 1 - tile
    divided = max(tile - int(record["whole_tiles"]), 0)
    return tile + divided * (int(record["parts"]["divisor"]) - 1)


def place_of(record, number, tile):
    """What `find_tile` returns."""
    whole = int(record["whole_tiles"])
    if number >= whole:
        number = whole + (number - whole) // int(record["parts"]["divisor"])
    tiles = math.prod(record["tiles"]["divisor"].tolist())
    if record["longest_last"]:
        number = int(record["tile_count"]) - 1 - number
    return tile.batch * tiles + number % tiles


@given(walk=walks())
def test_tiles_at_a_place_have_the_same_boxes(walk):
    """For which a mask is looked at once."""
    problem, pass_, plan, work = walk
    assume(not pass_.rows_are_keys and not plan.form.cluster)
    record = _record(problem, plan, pass_, work, NO_FOLDINGS)[0]
    places, most = count_seen_boxes(problem, plan, pass_)
    first = [find_tile(problem, pass_, record, tile_at(record, place)) for place in range(places)]
    for number in range(work.blocks):
        tile = find_tile(problem, pass_, record, number)
        own = first[place_of(record, number, tile)]
        assert own.head == 0
        assert (tile.batch, tile.groups, tile.columns) == (own.batch, own.groups, own.columns)
        assert len(boxes_of(tile, plan.column_box)) <= most


# sums.cuh and rounding.cuh


def granules_of(problem, record):
    return -(-(problem.tokens[-1] + int(record["granule_lead"])) // GRANULE)


class Contribution(NamedTuple):
    """`SumMemory`: dQ of 64 queries of a box, a line of it."""

    line: int
    first_query: int


def contributions_to(problem):
    """Those of each warpgroup."""
    if problem.head_dim > LINE:
        return [Contribution(line, 0) for line in (0, 1)]
    return [Contribution(0, first) for first in (0, ROWS)]


def granules_of_lane(problem, record, tile, head, begins, lane, contribution):
    """`add_sums`: the granules of a contribution that a lane takes, and the first it adds to."""
    box = record["column_box"].tolist()
    run = min(box[-1], ROWS) // GRANULE
    column = lane * run * GRANULE
    granule = lane * run - contribution.first_query // GRANULE
    if column >= math.prod(box) or not 0 <= granule < ROWS // GRANULE:
        return range(0), 0
    inside = np.add(begins, np.unravel_index(column, box))
    *index, first = np.add(inside, [begin for begin, _ in tile.columns]).astype(int).tolist()
    if any(i >= n for i, n in zip(index, problem.tokens, strict=False)):
        return range(0), 0
    at = tile.batch * problem.heads + head
    for i, n in zip(index, problem.tokens, strict=False):
        at = at * n + i
    begin = int(first + record["granule_lead"]) // GRANULE
    granules = granules_of(problem, record)
    return range(granule, granule + min(run, granules - begin)), at * granules + begin


def queries_of(problem, record, granule):
    """`round_granule`: of the rows of a granule batch entry, head and token, if they exist."""
    rest, along = divmod(granule, granules_of(problem, record))
    token = []
    for n in reversed(problem.tokens[:-1]):
        rest, index = divmod(rest, n)
        token.insert(0, index)
    first = along * GRANULE - int(record["granule_lead"])
    tokens = [(*token, first + row) for row in range(GRANULE)]
    batch_head = divmod(rest, problem.heads)
    return [(*batch_head, x) if 0 <= x[-1] < problem.tokens[-1] else None for x in tokens]


@given(data=st.data())
def test_contributions_go_to_the_sums_of_their_queries(data):
    dims = tuple(each for each in ALL_DIMS if each[0] > LINE and max(each) <= 128)
    dims += tuple(each for each in ALL_DIMS if each[0] > 32 and max(each) <= LINE)
    problem = data.draw(supported(("backward",), most_tokens=300, dims=dims))
    axes = tuple(replace(axis, dilation=1) for axis in problem.axes)
    problem = replace(problem, additional=None, axes=axes)
    assert any(BACKWARD in way for way in ways(problem))
    plan = data.draw(st.sampled_from(plans(problem, BACKWARD)))
    work = division(problem, plan, H200, BACKWARD)
    assert work.parts == 1
    record = _record(problem, plan, BACKWARD, work, NO_FOLDINGS)[0]
    count = sum_granules(problem, int(record["granule_lead"]))
    rounded = [queries_of(problem, record, granule) for granule in range(count)]
    queries = Counter(query for granule in rounded for query in granule if query is not None)
    assert len(queries) == problem.batch * problem.heads * math.prod(problem.tokens)
    assert set(queries.values()) == {1}
    for number in range(work.blocks):
        tile = find_tile(problem, BACKWARD, record, number)
        begin_of_tile = [begin for begin, _ in tile.columns]
        head, groups = tile.column_heads[-1], [0] * problem.rank
        for begins in boxes_of(tile, plan.column_box):
            tokens = token_numbers(
                axes, problem.tokens, groups, begins + begin_of_tile, plan.column_box
            )
            added = Counter()
            for lane, mine in itertools.product(range(32), contributions_to(problem)):
                taken, first = granules_of_lane(problem, record, tile, head, begins, lane, mine)
                for granule, added_to in zip(taken, rounded[first:], strict=False):
                    begin = mine.first_query + GRANULE * granule
                    for row, query in zip(range(begin, begin + GRANULE), added_to, strict=True):
                        if tokens[row] >= 0:
                            token = np.unravel_index(tokens[row], problem.tokens)
                            assert query == (tile.batch, head, tuple(map(int, token)))
                            added[row, mine.line] += 1
            lines = range(math.ceil(problem.head_dim / LINE))
            wanted = itertools.product(np.flatnonzero(tokens >= 0).tolist(), lines)
            assert added == Counter(wanted), "every query gets each line once"


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_a_quad_holds_every_column_once(columns):
    assert sorted(held(columns).flat) == list(range(columns))
    assert columns // 4 <= 32, "the bits of a word"


def first_columns(end, quad):
    """`first_columns` of cuda/hopper/mask.cuh."""
    left = max(end - 2 * quad, 0)
    bits = left // 8 * 2 + min(left % 8, 2)
    return 0xFFFFFFFF if bits >= 32 else (1 << bits) - 1


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_the_last_additional_keys_are_shown(columns):
    for left in range(1, 2 * columns):
        for quad, of_quad in enumerate(held(columns)):
            word = first_columns(left, quad)
            assert [word >> bit & 1 for bit in range(columns // 4)] == (of_quad < left).tolist()


@given(problem=supported(("forward", "backward"), most_tokens=1000, dims=ALL_DIMS))
def test_a_plan_fits_the_kernel(problem):
    for pass_ in itertools.chain(*ways(problem)):
        plan = make_plan(problem, H200, pass_)
        assert plan in plans(problem, pass_)
        assert shared_bytes(problem, plan.form, pass_) <= H200.shared_memory
        assert plan.form.row_slots >= plan.form.warpgroups
        assert plan.form.stages >= 2
        work = division(problem, plan, H200, pass_)
        assert 0 <= work.whole <= work.tiles
        assert 1 <= work.parts <= plan.form.warpgroups
        assert work.parts > 1 or work.whole == work.tiles
