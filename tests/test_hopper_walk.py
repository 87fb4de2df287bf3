"""Every query meets every key that it sees once: a model of the walk of cuda/hopper."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from helpers.brute_force import visible_mask
from helpers.hopper import ALL_DIMS, H200, plans, supported
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends.hopper.launch import _record, divisor
from cuneigh._backends.hopper.plan import ROWS, count, form_of, make_plan, shared_bytes
from cuneigh._backends.hopper.tensor_maps import Folding

NO_FOLDINGS = (Folding(0, 0, 0),) * 3


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
    kv_head: int
    groups: tuple[int, ...]
    first: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]


def box_begin(axis, box, size):
    """(dilation group, first index) of box number `box`: groups of a length lie side by side."""
    for group in range(axis.dilation):
        boxes = -(-axis.group_length(group) // size)
        if box < boxes:
            return group, box * size
        box -= boxes
    raise AssertionError("there are fewer boxes than tiles")


def find_tile(problem, record, number):
    groups, first, keys = [], [], []
    rest = int(record["tile_count"]) - 1 - number if record["longest_last"] else number
    for r in reversed(range(problem.rank)):
        axis, size = problem.axes[r], int(record["tile_box"][r])
        outer = quotient(record["tiles"][r], rest)
        group, index = box_begin(axis, rest - outer * int(record["tiles"][r]["divisor"]), size)
        rest = outer
        last = min(index + size, axis.group_length(group)) - 1
        groups.append(group)
        first.append(index)
        keys.append((axis.window(index, group)[0], axis.window(last, group)[1]))
    batch = quotient(record["head_groups"], rest)
    head_group = rest - batch * int(record["head_groups"]["divisor"])
    head = head_group * int(record["heads_per_tile"])
    kv_head = quotient(record["group_size"], head)
    return Tile(batch, head, kv_head, *(tuple(each[::-1]) for each in (groups, first, keys)))


def boxes_of(tile, key_box):
    """Where boxes of keys begin, counted from the first key of the tile on."""
    lengths = [
        -(-(end - begin) // size) for (begin, end), size in zip(tile.keys, key_box, strict=True)
    ]
    return np.array(list(np.ndindex(*lengths))).reshape(-1, len(key_box)) * key_box


# mask.cuh

NONE, PARTIAL, ALL = range(3)


def columns(keys):
    """[4, keys / 4] The key whose logit a lane of a quad holds, by lane and bit of its word."""
    quad, bit = np.ogrid[:4, : keys // 4]
    return 8 * (bit // 2) + 2 * quad + bit % 2


def prefixes(key_box):
    """For each axis [extent + 1, 4] words: the keys of a box before each coordinate."""
    keys = math.prod(key_box)
    bits = np.uint32(1) << np.arange(keys // 4, dtype=np.uint32)
    coordinates = np.unravel_index(columns(keys), key_box)
    return [
        np.array([(bits * (along < before)).sum(-1, dtype=np.uint32) for before in range(size + 1)])
        for along, size in zip(coordinates, key_box, strict=True)
    ]


def windows_of(problem, record, tile, w):
    """Along each axis: windows of the coordinates of a warpgroup, those of all, and of each.

    Counted from the first key of the tile on, as begin and end.
    """
    for r, axis in enumerate(problem.axes):
        group, base = tile.groups[r], tile.keys[r][0]
        first = tile.first[r] + int(record["warpgroup"][w][1 + r])
        size, length = int(record["query_box"][r]), axis.group_length(group)
        clamped = [min(first + i, length - 1) for i in range(size)]
        windows = np.array([axis.window(index, group) for index in clamped]) - base
        if first >= length:
            yield windows, (0, 0), (0, 0)
            continue
        low, high = windows[0], windows[-1]
        yield windows, (low[0], high[1]), (high[0], low[1])


def visit(windows, begins, record, words):
    """What a warpgroup does with a box of keys, and whom its words show [64, keys] if it does."""
    query_box, key_box = record["query_box"].tolist(), record["key_box"].tolist()
    ends = begins + key_box
    none, covers = False, True
    shown = np.full((ROWS, 4), 0xFFFFFFFF, np.uint32)
    of_row = np.unravel_index(np.arange(ROWS), query_box)
    for r, (of_coordinates, (low, high), (begin, end)) in enumerate(windows):
        none |= begins[r] >= high or ends[r] <= low
        covers &= begin <= begins[r] and ends[r] <= end
        before, until = np.clip(of_coordinates - begins[r], 0, key_box[r]).T
        shown &= (words[r][until] & ~words[r][before])[of_row[r]]
    if none:
        return NONE, None
    keys = math.prod(key_box)
    if covers:
        return ALL, np.ones((ROWS, keys), bool)
    held = columns(keys)
    visible = np.zeros((ROWS, keys), bool)
    visible[:, held] = shown[:, :, None] >> np.arange(keys // 4, dtype=np.uint32) & 1
    return PARTIAL, visible


# The walk


def token_numbers(axes, lengths, groups, first, box):
    """Numbers in raster order of the tokens of a box; -1 where it lies past the end of an axis."""
    index = np.array(np.unravel_index(np.arange(math.prod(box)), box)).T + first
    dilations = [axis.dilation for axis in axes]
    tokens = (index * dilations + groups).T
    exists = (tokens < np.array(lengths)[:, None]).all(0)
    clamped = np.minimum(tokens, np.array(lengths)[:, None] - 1)
    return np.where(exists, np.ravel_multi_index(tuple(clamped), lengths), -1)


@given(problem=supported(most_tokens=300, dims=ALL_DIMS), data=st.data())
def test_every_visible_pair_is_met_once(problem, data):
    plan = data.draw(st.sampled_from(plans(problem)))
    counts = count(problem, plan)
    tiles = counts.blocks * problem.batch * problem.heads // plan.heads
    record = _record(problem, plan, tiles, NO_FOLDINGS)[0]
    rows: Counter[tuple[int, int, int]] = Counter()
    met = np.zeros((plan.heads, math.prod(problem.tokens), math.prod(problem.key_tokens)), int)
    blocks = loads = visits = full = longest = 0
    words = prefixes(plan.key_box)
    for number in range(tiles):
        tile = find_tile(problem, record, number)
        is_counted = (tile.batch, tile.head) == (0, 0)
        boxes = boxes_of(tile, plan.key_box) if is_counted else []
        blocks, loads = blocks + is_counted, loads + len(boxes)
        longest = max(longest, len(boxes))
        for w in range(plan.form.warpgroups):
            head, *offset = record["warpgroup"][w].tolist()
            first = np.add(tile.first, offset)
            queries = token_numbers(
                problem.axes, problem.tokens, tile.groups, first, plan.query_box
            )
            exists = queries >= 0
            assert (tile.head + head) // problem.group_size == tile.kv_head
            rows.update((tile.batch, tile.head + head, x) for x in queries[exists].tolist())
            windows = list(windows_of(problem, record, tile, w)) if is_counted else []
            for begins in boxes:
                begin = begins + [keys[0] for keys in tile.keys]
                keys = token_numbers(
                    problem.axes, problem.key_tokens, tile.groups, begin, plan.key_box
                )
                visibility, visible = visit(windows, begins, record, words)
                if visibility == NONE:
                    continue
                visits += head == 0
                full += head == 0 and visibility == ALL
                row, key = np.nonzero(visible & exists[:, None])
                assert (keys[key] >= 0).all(), "a key past the end of an axis is shown"
                np.add.at(met[head], (queries[row], keys[key]), 1)
    np.testing.assert_array_equal(met, np.broadcast_to(visible_mask(problem), met.shape))
    assert counts == (blocks, loads, visits, full, longest)
    assert set(rows.values()) == {1}
    assert len(rows) == problem.batch * problem.heads * math.prod(problem.tokens)


@pytest.mark.parametrize("keys", [64, 128])
def test_a_warpgroup_holds_every_column_once(keys):
    assert sorted(columns(keys).flat) == list(range(keys))
    assert keys // 4 <= 32, "the bits of a word"


def first_keys(end, quad):
    """`first_keys` of cuda/hopper/mask.cuh."""
    left = max(end - 2 * quad, 0)
    bits = left // 8 * 2 + min(left % 8, 2)
    return 0xFFFFFFFF if bits >= 32 else (1 << bits) - 1


@pytest.mark.parametrize("keys", [64, 128])
def test_the_last_additional_keys_are_shown(keys):
    for left in range(1, 2 * keys):
        for quad, held in enumerate(columns(keys)):
            word = first_keys(left, quad)
            assert [word >> bit & 1 for bit in range(keys // 4)] == (held < left).tolist()


@given(problem=supported(most_tokens=1000, dims=ALL_DIMS))
def test_a_plan_fits_the_kernel(problem):
    form = form_of(problem, H200)
    assert make_plan(problem, H200) in plans(problem)
    assert shared_bytes(problem, form) <= H200.shared_memory
    assert form.query_slots >= form.warpgroups
    assert form.stages >= 2
