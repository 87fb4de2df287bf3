"""`Axis` against the rules of a window, written out again in `brute_force`."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.brute_force import sees, visible_keys
from helpers.strategies import windows
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends import BACKENDS
from cuneigh._window import CONTRACT, Axis


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


def check_window(axis: Axis) -> None:
    for x in range(axis.length):
        group, index = x % axis.dilation, x // axis.dilation
        start, end = axis.window(index, group)
        keys = [j * axis.dilation + group for j in range(start, end)]
        assert keys == visible_keys(axis, x), (axis, x)


def check_inverse(axis: Axis) -> None:
    for y in range(axis.key_length):
        group, index = y % axis.dilation, y // axis.dilation
        start, end = axis.inverse(index, group)
        queries = [i * axis.dilation + group for i in range(start, end)]
        assert queries == [x for x in range(axis.length) if sees(axis, x, y)], (axis, y)


def check_contract(axis: Axis) -> None:
    """What the docstring of `_window` promises; that it is one range, the checks above show."""
    for function, of_tokens, of_seen in (
        (axis.window, axis.group_length, axis.key_group_length),
        (axis.inverse, axis.key_group_length, axis.group_length),
    ):
        for group in range(axis.dilation):
            index = np.arange(of_tokens(group))
            begin, end = function(index, np.full_like(index, group))
            assert (begin >= 0).all(), axis
            assert (begin <= end).all(), axis
            assert (end <= of_seen(group)).all(), axis
            assert (np.diff(begin) >= 0).all(), axis
            assert (np.diff(end) >= 0).all(), axis


def test_every_small_axis():
    for axis in legal_axes(longest=16):
        check_window(axis)
        check_inverse(axis)
        check_contract(axis)


@given(axes())
def test_the_contract(axis):
    check_contract(axis)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)
def test_backends_rely_on_what_windows_promise(backend):
    assert backend.RELIES_ON in CONTRACT


@given(axes())
def test_window(axis):
    check_window(axis)


@given(axes())
def test_inverse(axis):
    check_inverse(axis)


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
def test_visible_pairs(axis):
    pairs = sum(sees(axis, x, y) for x in range(axis.length) for y in range(axis.key_length))
    assert axis.visible_pairs() == pairs


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
