"""The window header of the kernels, built by the host compiler, against `Axis`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from test_window import axes, legal_axes

from cuneigh._window import Axis

CUDA = Path(__file__).resolve().parents[1] / "cuda"

SOURCE = """
#include "cuneigh/window.cuh"
using cuneigh::Axis;
using cuneigh::GroupIndex;
using cuneigh::Range;

extern "C" {
int group_length(Axis axis, int group) { return axis.group_length(group); }
int key_group_length(Axis axis, int group) { return axis.key_group_length(group); }
Range window(Axis axis, int index, int group) { return axis.window(index, group); }
Range inverse(Axis axis, int index, int group) { return axis.inverse(index, group); }
GroupIndex group_index(Axis axis, int position, int count) {
  return axis.group_index(position, count);
}
int token(Axis axis, GroupIndex at) { return axis.token(at); }
}
"""


class CAxis(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("length", "key_length", "kernel_size")),
        *((name, ctypes.c_int) for name in ("stride", "dilation")),
        ("is_causal", ctypes.c_bool),
    ]


class CRange(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_int), ("end", ctypes.c_int)]


class CGroupIndex(ctypes.Structure):
    _fields_ = [("group", ctypes.c_int), ("index", ctypes.c_int)]


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: c++, g++ and clang++ were not found")
    folder = tmp_path_factory.mktemp("header")
    source, library = folder / "header.cpp", folder / "header.so"
    source.write_text(SOURCE)
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{CUDA}"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("group_length", "key_group_length"):
        getattr(loaded, name).argtypes = [CAxis, ctypes.c_int]
    for name, result in (("window", CRange), ("inverse", CRange), ("group_index", CGroupIndex)):
        getattr(loaded, name).argtypes = [CAxis, ctypes.c_int, ctypes.c_int]
        getattr(loaded, name).restype = result
    loaded.token.argtypes = [CAxis, CGroupIndex]
    return loaded


def check(header: ctypes.CDLL, axis: Axis) -> None:
    twin = CAxis(
        axis.length, axis.key_length, axis.kernel_size, axis.stride, axis.dilation, axis.is_causal
    )

    def pair(result: CRange) -> tuple[int, int]:
        return result.begin, result.end

    for group in range(axis.dilation):
        assert header.group_length(twin, group) == axis.group_length(group)
        assert header.key_group_length(twin, group) == axis.key_group_length(group)
        for index in range(axis.group_length(group)):
            window = pair(header.window(twin, index, group))
            assert window == axis.window(index, group), (axis, index, group)
        for index in range(axis.key_group_length(group)):
            inverse = pair(header.inverse(twin, index, group))
            assert inverse == axis.inverse(index, group), (axis, index, group)

    # Positions go through the groups one after the other, each in the order of its tokens.
    for count in {axis.length, axis.key_length}:
        indices = [header.group_index(twin, position, count) for position in range(count)]
        in_order = sorted(range(count), key=lambda token: (token % axis.dilation, token))
        assert [header.token(twin, index) for index in indices] == in_order, (axis, count)
        assert [index.group for index in indices] == [token % axis.dilation for token in in_order]


def test_every_small_axis(header):
    for axis in legal_axes(longest=10):
        check(header, axis)


@given(axis=axes())
def test_header(header, axis):
    check(header, axis)
