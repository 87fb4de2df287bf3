"""`Axis` against the rules of a window, written out again in `brute_force`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.brute_force import relative, slots_along, visible_keys
from helpers.strategies import windows
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends import BACKENDS
from cuneigh._window import BORDERS, CONTRACT, Axis, Promise


def legal_axes(longest: int):
    """Every legal axis of up to `longest` tokens."""
    for length in range(1, longest + 1):
        for dilation in range(1, length + 1):
            for kernel_size in range(1, length // dilation + 1):
                for stride in range(1, kernel_size + 1):
                    for is_causal in (False, True):
                        yield Axis(length, length, kernel_size, stride, dilation, is_causal)


@st.composite
def axes(draw, longest: int = 150) -> Axis:
    """A legal axis, now and then that of cross attention."""
    length = draw(st.integers(1, longest))
    if draw(st.integers(0, 9)) == 9:
        key_length = draw(st.integers(1, longest))
        return Axis(length, key_length, key_length, 1, 1, False)
    window = draw(windows((length,)))
    return Axis(length, length, *(entries[0] for entries in window))


@st.composite
def parts(draw, longest: int = 40) -> Axis:
    """A legal axis with any border, of which any part is given."""
    border = draw(st.sampled_from(BORDERS))
    dilation = draw(st.sampled_from([1, 1, 2, 3, 5]))
    groups = draw(st.integers(1, max(longest // dilation, 1)))
    layout = groups * dilation
    if border != "wrap":
        layout += draw(st.integers(0, dilation - 1))
    kernel_size = draw(st.integers(1, groups + 5 * (border == "cut")))
    is_causal = border != "wrap" and draw(st.booleans())
    whole = Axis(
        *(layout, layout, kernel_size, draw(st.integers(1, kernel_size)), dilation),
        *(is_causal, border),
    )
    return draw(st.sampled_from([whole, *(draw(part_of(whole)) for _ in range(3))]))


@st.composite
def part_of(draw, whole: Axis) -> Axis:
    of_side = []
    for _ in range(2):
        length = draw(st.integers(0, whole.layout))
        last = whole.layout - 1 if whole.border == "wrap" else whole.layout - length
        of_side.append((length, draw(st.integers(0, last))))
    (length, start), (key_length, key_start) = of_side
    return replace(whole, length=length, key_length=key_length).at(start, key_start)


def all_parts(longest: int):
    """Every part of every legal axis of up to `longest` tokens."""
    for layout, border in itertools.product(range(1, longest + 1), BORDERS):
        is_ring = border == "wrap"
        dilations = [d for d in range(1, layout + 1) if not is_ring or layout % d == 0]
        of_side = [
            (length, start)
            for length in range(layout + 1)
            for start in range(layout if is_ring else layout - length + 1)
        ]
        for dilation, is_causal in itertools.product(dilations, (False, True)[: 2 - is_ring]):
            largest = layout // dilation + 2 * (border == "cut")
            for kernel_size in range(1, largest + 1):
                for stride in range(1, kernel_size + 1):
                    rest = kernel_size, stride, dilation, is_causal, border, layout
                    for (n, start), (m, key_start) in itertools.product(of_side, of_side):
                        yield Axis(n, m, *rest, start, key_start)


def check_axis(axis: Axis) -> None:
    """Windows and their inverse against the rules, and against what `_window` promises of them."""
    sides = axis.length, axis.key_length
    expected = np.zeros(sides, bool)
    for x in range(axis.length):
        expected[x, visible_keys(axis, x)] = True
    assert axis.visible_pairs() == expected.sum(), axis
    check_side(axis, sides, axis.window, (axis.group_length, axis.key_group), expected)
    of_keys = axis.key_group_length, axis.query_group
    check_side(axis, sides[::-1], axis.inverse, of_keys, expected.T)


def check_side(axis: Axis, sides, function, of_group, expected) -> None:
    (rows, columns), (count, seen_group) = sides, of_group
    is_inside = Promise.INSIDE in axis.promises
    got = np.zeros_like(expected, int)
    for group in range(min(axis.dilation, rows)):
        other = seen_group(group)
        given = len(range(other, columns, axis.dilation))
        index = np.arange(count(group))
        begin, end = function(index, np.full_like(index, group))
        assert (begin >= 0).all(), axis
        assert (begin <= end).all(), axis
        assert (np.diff(begin) >= 0).all(), axis
        assert (np.diff(end) >= 0).all(), axis
        assert (end <= given).all() if is_inside else (end - begin <= axis.ring).all(), axis
        for i, first, last in zip(index.tolist(), begin.tolist(), end.tolist(), strict=True):
            assert function(i, group) == (first, last), axis
            for u in range(first, last):
                j = u if is_inside else u % axis.ring
                if j < given:
                    got[i * axis.dilation + group, j * axis.dilation + other] += 1
    np.testing.assert_array_equal(got, expected, str(axis))


def check_slots(axis: Axis) -> None:
    """Which key each slot of a query holds, and which element of rpb belongs to it."""
    is_inside = Promise.INSIDE in axis.promises
    for x in range(axis.length):
        index, group = x // axis.dilation, x % axis.dilation
        begin, end = axis.unclipped(index, group)
        other = axis.key_group(group)
        slots = []
        for slot, u in enumerate(range(begin, end)):
            j = u if is_inside else u % axis.ring
            if 0 <= j < axis.key_group_length(other):
                slots.append((slot, j * axis.dilation + other))
            if axis.stride == 1 and not axis.is_causal:
                assert axis.relative(index, u, group) == relative(axis, x, slot), axis
        assert slots == slots_along(axis, x), axis


def test_every_small_axis():
    for axis in legal_axes(longest=12):
        check_axis(axis)


def test_parts_of_every_small_axis():
    for axis in itertools.islice(all_parts(longest=4), 0, None, 61):
        check_axis(axis)
        check_slots(axis)


@given(axes())
def test_axes(axis):
    check_axis(axis)


@given(parts())
def test_parts(axis):
    check_axis(axis)
    check_slots(axis)


def test_what_serves_other_starts_of_every_small_axis_is_a_part():
    """Kernels of whole layouts do not know where a part starts."""
    for axis in itertools.islice(all_parts(longest=4), 0, None, 61):
        assert axis.anywhere().is_ordinary == axis.is_ordinary, axis


@given(parts())
def test_what_serves_other_starts_keeps_the_same_promises(axis):
    there = axis.anywhere()
    assert there.promises == axis.promises
    assert there.is_ordinary == axis.is_ordinary
    assert there.at(axis.query_start, axis.key_start) == axis
    assert there.anywhere() == there


@pytest.mark.parametrize("border", BORDERS)
def test_one_axis_serves_all_tiles_of_a_layout(border):
    """Tiles of 10 tokens with their halos."""
    axis = Axis(10, 16, 7, 1, 1, False, border, layout=100)
    assert len({axis.at(x, x - 3).anywhere() for x in range(3, 84)}) == 1


def test_a_tile_with_its_halo_crosses_no_seam():
    axis = Axis(10, 16, 7, 1, 1, False, "wrap", layout=100)
    assert all(axis.at(x, x - 3).promises == CONTRACT for x in range(100))
    all_keys = replace(axis, key_length=100)
    crossing = [x for x in range(100) if all_keys.at(x, 0).promises != CONTRACT]
    assert crossing == [*range(3), *range(88, 100)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)
def test_backends_rely_on_what_windows_promise(backend):
    assert backend.RELIES_ON in CONTRACT


@given(axes())
def test_numpy_arrays_give_what_ints_give(axis):
    token = np.arange(axis.length)
    start, end = axis.window(token // axis.dilation, token % axis.dilation)
    pairs = [axis.window(x // axis.dilation, x % axis.dilation) for x in range(axis.length)]
    assert list(zip(start, end, strict=True)) == pairs
    for whole, expected in zip(axis.windows(), (start, end), strict=True):
        np.testing.assert_array_equal(whole, expected)
    token = np.arange(axis.key_length)
    start, end = axis.inverse(token // axis.dilation, token % axis.dilation)
    pairs = [axis.inverse(y // axis.dilation, y % axis.dilation) for y in range(axis.key_length)]
    assert list(zip(start, end, strict=True)) == pairs


@given(axes())
def test_group_lengths(axis):
    for group in range(axis.dilation):
        tokens = range(group, axis.length, axis.dilation)
        keys = range(group, axis.key_length, axis.dilation)
        assert axis.group_length(group) == len(tokens)
        assert axis.key_group_length(group) == len(keys)


@given(axes())
def test_what_is_always_seen(axis):
    for x in range(axis.length):
        keys = visible_keys(axis, x)
        if axis.is_causal:
            assert keys[-1] == x
        else:
            assert len(keys) == axis.kernel_size
            assert axis.stride > 1 or axis.length != axis.key_length or x in keys


@pytest.mark.parametrize(
    ("axis", "x", "keys"),
    [
        # The examples of the rules, counted by hand.
        (Axis(9, 9, 4, 1, 1, False), 4, [2, 3, 4, 5]),  # an even window leans to the left
        (Axis(9, 9, 3, 1, 1, False), 0, [0, 1, 2]),  # pushed inwards at the border
        (Axis(9, 9, 3, 1, 1, True), 1, [0, 1]),  # cut short by the left border
        (Axis(9, 9, 3, 3, 1, False), 5, [3, 4, 5]),  # stride = kernel_size: blocks
        (Axis(9, 9, 3, 2, 1, False), 2, [2, 3, 4]),  # the leader of 2 and 3 is 3
        (Axis(9, 9, 4, 2, 1, True), 2, [0, 1, 2]),  # the leader of 2 and 3 is 3
        (Axis(10, 10, 3, 1, 3, False), 7, [1, 4, 7]),  # group 1 is 1, 4, 7: the last of 3
        (Axis(10, 10, 3, 1, 3, False), 9, [3, 6, 9]),  # group 0 has one token more
        (Axis(4, 4, 4, 1, 1, False), 2, [0, 1, 2, 3]),  # self attention
    ],
)
def test_examples(axis, x, keys):
    start, end = axis.window(x // axis.dilation, x % axis.dilation)
    assert [j * axis.dilation + x % axis.dilation for j in range(start, end)] == keys
