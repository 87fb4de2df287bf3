"""The window header of the kernels, built by the host compiler, against `Axis`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from test_window import axes, legal_axes, parts

from cuneigh._gpu.records import START_WORDS, axis_type, fill_axes, start_words
from cuneigh._window import Axis

CUDA = Path(__file__).resolve().parents[1] / "cuda"

SOURCE = """
#ifdef PARTS
#define CUNEIGH_PARTS
#endif
#include "cuneigh/window.cuh"
using cuneigh::Axis;
using cuneigh::GroupIndex;
using cuneigh::Range;

extern "C" {
int group_length(Axis axis, int group) { return axis.group_length(group); }
int key_group_length(Axis axis, int group) { return axis.key_group_length(group); }
int key_group(Axis axis, int group) { return axis.key_group(group); }
int query_group(Axis axis, int group) { return axis.query_group(group); }
Range window(Axis axis, int index, int group) { return axis.window(index, group); }
Range unclipped(Axis axis, int index, int group) { return axis.unclipped(index, group); }
Range inverse(Axis axis, int index, int group) { return axis.inverse(index, group); }
int crosses(Axis axis) { return axis.crosses(); }
int turned(Axis axis, int index) { return axis.turned(index); }
int shift(Axis axis, int group) { return axis.shift(group); }
int inverse_shift(Axis axis, int group) { return axis.inverse_shift(group); }
int slot(Axis axis, int key, int index, int group) { return axis.slot(key, index, group); }
GroupIndex group_index(Axis axis, int position, int count) {
  return axis.group_index(position, count);
}
int token(Axis axis, GroupIndex at) { return axis.token(at); }
}
"""


class CWholeAxis(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("length", "key_length", "kernel_size")),
        *((name, ctypes.c_int) for name in ("stride", "dilation")),
        ("is_causal", ctypes.c_bool),
    ]


class CPartAxis(ctypes.Structure):
    _fields_ = [("words", ctypes.c_int * 12)]


class CRange(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_int), ("end", ctypes.c_int)]


class CGroupIndex(ctypes.Structure):
    _fields_ = [("group", ctypes.c_int), ("index", ctypes.c_int)]


class Header:
    """The header with the axes of one kind."""

    def __init__(self, library: ctypes.CDLL, has_parts: bool) -> None:
        self.library, self.has_parts = library, has_parts
        self.struct = CPartAxis if has_parts else CWholeAxis
        ints = [ctypes.c_int] * 3
        for name, result, count in (
            *((name, ctypes.c_int, 1) for name in ("group_length", "key_group_length", "turned")),
            *((name, ctypes.c_int, 1) for name in ("key_group", "query_group")),
            *((name, ctypes.c_int, 1) for name in ("shift", "inverse_shift")),
            *((name, CRange, 2) for name in ("window", "unclipped", "inverse")),
            ("crosses", ctypes.c_int, 0),
            ("slot", ctypes.c_int, 3),
            ("group_index", CGroupIndex, 2),
        ):
            function = getattr(library, name)
            function.argtypes, function.restype = [self.struct, *ints[:count]], result
        library.token.argtypes = [self.struct, CGroupIndex]

    def axis(self, axis: Axis) -> SimpleNamespace:
        """The twin of `axis`: the record that a launch makes of it, and the header's functions."""
        record = np.zeros(1, [("axes", axis_type(self.has_parts), (1,))])
        problem = SimpleNamespace(axes=(axis,))
        fill_axes(record, problem)
        if self.has_parts:
            for name, word in zip(START_WORDS, start_words(problem) or (0, -1 << 63), strict=True):
                record["axes"][name] = word
        twin = self.struct.from_buffer_copy(record.tobytes())

        def bound(function):
            def call(*arguments):
                result = function(twin, *arguments)
                return (result.begin, result.end) if isinstance(result, CRange) else result

            return call

        names = ("group_length", "key_group_length", "key_group", "query_group", "crosses")
        names += ("window", "unclipped", "inverse", "turned", "shift", "inverse_shift", "slot")
        names += ("group_index", "token")
        return SimpleNamespace(**{name: bound(getattr(self.library, name)) for name in names})


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "parts"])
def header(request, tmp_path_factory) -> Header:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: c++, g++ and clang++ were not found")
    folder = tmp_path_factory.mktemp("header")
    source, library = folder / "header.cpp", folder / "header.so"
    source.write_text(SOURCE)
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CUDA}"]
    options += ["-DPARTS"] * request.param
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return Header(ctypes.CDLL(str(library)), request.param)


def check(header: Header, axis: Axis) -> None:
    twin = header.axis(axis)
    crosses = bool(twin.crosses())
    for group in range(axis.dilation):
        assert twin.group_length(group) == axis.group_length(group)
        assert twin.key_group_length(group) == axis.key_group_length(group)
        key_group = twin.key_group(group)
        assert (key_group, twin.query_group(group)) == (
            axis.key_group(group),
            axis.query_group(group),
        )
        for index in range(axis.group_length(group)):
            window, slots = twin.window(index, group), axis.unclipped(index, group)
            assert window == axis.window(index, group), (axis, index, group)
            assert twin.unclipped(index, group) == slots, (axis, index, group)
            for u in range(*window):
                # The bias and the slot of a pair, as kernels count them from either side
                distance = u + twin.shift(group) - index
                assert distance + axis.kernel_size - 1 == axis.relative(index, u, group), axis
                key = twin.turned(u)
                assert key == (u % axis.ring if crosses else u)
                assert twin.slot(key, index, group) == u - slots[0], (axis, index, u)
                if key < axis.key_group_length(key_group):
                    begin, end = twin.inverse(key, key_group)
                    (v,) = (v for v in range(begin, end) if twin.turned(v) == index)
                    assert key + twin.inverse_shift(key_group) - v == distance, (axis, index, u)
        for index in range(axis.key_group_length(group)):
            inverse = twin.inverse(index, group)
            assert inverse == axis.inverse(index, group), (axis, index, group)

    # Positions go through the groups one after the other, each in the order of its tokens.
    for count in {axis.length, axis.key_length}:
        indices = [twin.group_index(position, count) for position in range(count)]
        in_order = sorted(range(count), key=lambda token: (token % axis.dilation, token))
        assert [twin.token(index) for index in indices] == in_order, (axis, count)
        assert [index.group for index in indices] == [token % axis.dilation for token in in_order]


def test_every_small_axis(header):
    for axis in legal_axes(longest=7):
        check(header, axis)


@given(axis=axes(longest=60))
def test_header(header, axis):
    if header.has_parts and axis.length > axis.layout:
        return  # there are more queries than the layout has tokens in cross attention only
    check(header, axis)


@given(axis=parts())
def test_parts(header, axis):
    if header.has_parts:
        check(header, axis)
