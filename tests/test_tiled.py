"""Calls in tiles against one call on everything; how tiles are cut, and what they take."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from helpers.strategies import generators
from hypothesis import given, settings
from hypothesis import strategies as st

import cuneigh
from cuneigh._shards.tiles import tiles_of
from cuneigh._tiled import computing
from cuneigh._tiled.slots import HostSlot
from cuneigh._window import BORDERS

FUNCTIONS = {1: cuneigh.na1d, 2: cuneigh.na2d, 3: cuneigh.na3d}
LONGEST = {1: 40, 2: 12, 3: 6}


@st.composite
def calls(draw) -> tuple[int, dict[str, Any]]:
    """The token axes of a call on a whole layout, and its arguments."""
    rng, rank = draw(generators()), draw(st.sampled_from([1, 2, 3]))
    has_rpb = draw(st.integers(0, 3)) == 3
    along = []
    for _ in range(rank):
        border, dilation = draw(st.sampled_from(BORDERS)), draw(st.sampled_from([1, 1, 2, 3]))
        length = draw(st.integers(dilation, LONGEST[rank]))
        if border == "wrap":
            length -= length % dilation
        kernel_size = draw(st.integers(1, length // dilation)) + 2 * (border == "cut")
        stride = 1 if has_rpb else draw(st.integers(1, kernel_size))
        is_causal = border != "wrap" and not has_rpb and draw(st.booleans())
        along.append((length, kernel_size, stride, dilation, is_causal, border))
    tokens, *window, border = zip(*along, strict=True)
    batch, kv_heads, group, additional = (draw(st.integers(1, 2)) for _ in range(4))
    shape = (batch, *tokens, kv_heads)
    arguments: dict[str, Any] = dict(
        zip(("kernel_size", "stride", "dilation", "is_causal"), window, strict=True)
    )
    arguments |= {
        "query": rng.standard_normal((batch, *tokens, kv_heads * group, 3)),
        "key": rng.standard_normal((*shape, 3)),
        "value": rng.standard_normal((*shape, 2)),
        "border": border,
    }
    if draw(st.booleans()):
        arguments["key_mask"] = rng.random((batch, *tokens)) < 0.7
    if draw(st.booleans()):
        extra = (batch, additional, kv_heads)
        arguments["additional_keys"] = rng.standard_normal((*extra, 3))
        arguments["additional_values"] = rng.standard_normal((*extra, 2))
    if has_rpb:
        sizes = (2 * k - 1 for k in arguments["kernel_size"])
        arguments["rpb"] = rng.standard_normal((kv_heads * group, *sizes))
    return rank, arguments


def smallest(function: Any, **arguments: Any) -> int:
    """The bytes of the smallest tiles, by the error that says them."""
    with pytest.raises(ValueError, match=r"tiled: max_bytes=1 has no room") as caught:
        cuneigh.tiled(function, max_bytes=1, device="cpu", return_lse=True, **arguments)
    return int(re.search(r"which take (\d+) bytes", str(caught.value))[1])


@settings(max_examples=30)
@given(calls(), st.floats(0, 1))
def test_tiles_together_are_the_whole_and_take_no_more_than_they_may(call, share):
    rank, arguments = call
    least = smallest(FUNCTIONS[rank], **arguments)
    everything = sum(a.nbytes for a in arguments.values() if isinstance(a, np.ndarray))
    most = int(least + share * max(everything - least, 0) / 4)
    taken, tiles = [], []

    class Watched(HostSlot):
        def results(self):
            made = super().results()
            taken.append(self.given.nbytes + sum(array.nbytes for array in made))
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(computing, "HostSlot", Watched)
        patch.setattr(computing, "counting", lambda what, total: tiles.append(total) or _no_bar())
        output, lse = cuneigh.tiled(
            FUNCTIONS[rank], max_bytes=most, device="cpu", return_lse=True, **arguments
        )
    assert max(taken) <= most
    assert tiles == [len(taken)]
    wanted, wanted_lse = FUNCTIONS[rank](**arguments, return_lse=True)
    np.testing.assert_allclose(output, wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-9, atol=1e-9)


class _no_bar:  # noqa: N801 - stands for a function
    def __enter__(self):
        return lambda: None

    def __exit__(self, *error):
        pass


def test_files_are_read_and_written(tmp_path):
    arrays = np.random.default_rng(0).standard_normal((3, 1, 30, 20, 2, 4), "float32")
    files = []
    for name, array in zip("qkv", arrays, strict=True):
        files.append(np.lib.format.open_memmap(tmp_path / name, "w+", "float32", array.shape))
        files[-1][...] = array
    target = np.lib.format.open_memmap(tmp_path / "out", "w+", "float32", arrays.shape[1:])
    window = {"kernel_size": 5, "border": ("cut", "wrap")}
    output = cuneigh.tiled(
        cuneigh.na2d, *files, **window, max_bytes=100_000, out=target, device="cpu"
    )
    assert output is target
    target.flush()
    del target, output
    np.testing.assert_allclose(
        np.load(tmp_path / "out"), cuneigh.na2d(*arrays, **window), rtol=1e-5, atol=1e-5
    )


def test_few_keys_are_brought_twice():
    """Tiles are cut along the batch first, and then so that halos are small."""
    from cuneigh._window import Axis

    axes = tuple(Axis(64, 64, k, 1, 1, False) for k in (1, 9, 33))

    def bytes_of(sizes, many):
        return sizes.batch * (np.prod(sizes.queries) + np.prod(sizes.keys)) * (1 + many)

    for most in (64**3, 64**3 // 4, 20_000):
        tiles = tiles_of(4, axes, most, bytes_of)
        assert {tile.batch.length for tile in tiles} == {1}
        brought = sum(tile.keys.tokens for tile in tiles)
        assert brought <= 1.25 * 4 * 64**3  # of the axis without a halo there is enough to cut
        assert sum(tile.queries.tokens for tile in tiles) == 4 * 64**3
    (tile,) = tiles_of(4, axes, 8 * 64**3, bytes_of)
    assert tile.keys == tile.queries


def test_an_empty_layout():
    empty = np.empty((0, 8, 2, 4))
    output, lse = cuneigh.tiled(
        cuneigh.na1d, empty, empty, empty, 3, max_bytes=1, return_lse=True, device="cpu"
    )
    assert output.shape == (0, 8, 2, 4)
    assert lse.shape == (0, 8, 2)


ARRAY = np.random.default_rng(0).standard_normal((1, 9, 2, 4))
FROZEN = ARRAY.copy()
FROZEN.flags.writeable = False
ILLEGAL = {
    "function": (
        {"function": cuneigh.na1d_qk},
        TypeError,
        "function=.* is not one of cuneigh.na1d",
    ),
    "list": ({"query": [1.0]}, TypeError, r"query is of type list; .*numpy\.asarray\(query\)"),
    "max_bytes": ({"max_bytes": 1e9}, TypeError, "max_bytes=1000000000.0 is float, not an int"),
    "window": ({"kernel_size": 10}, ValueError, "kernel_size=10 times dilation=1 on axis 0"),
    "ring": ({"border": "wrap", "is_causal": True}, ValueError, "border='wrap' cannot be combined"),
    "device": ({"device": "gpu"}, ValueError, "device='gpu' is not 'cpu' or the number of a GPU"),
    "shape": ({"out": ARRAY[:, :8].copy()}, ValueError, "out has size 8 on axis 1, but 9 is"),
    "dtype": ({"out": ARRAY.astype("f4")}, TypeError, "out has dtype float32, but float64 is"),
    "frozen": ({"out": FROZEN}, ValueError, "out is read-only"),
    "common": ({"out": ARRAY}, ValueError, "out has memory in common with query"),
    "pair": ({"out": ARRAY.copy(), "return_lse": True}, TypeError, ".* a pair of arrays is needed"),
    "backend": ({"backend": "best"}, ValueError, "backend='best' is not one of"),
    "bool": ({"return_lse": 1}, TypeError, "return_lse=1 is int, not a bool"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_illegal_arguments(case):
    changes, error, message = ILLEGAL[case]
    arguments = {"function": cuneigh.na1d, "query": ARRAY, "key": ARRAY, "value": ARRAY}
    arguments |= {"kernel_size": 3, "max_bytes": 10**6, "device": "cpu"} | changes
    with pytest.raises(error, match=f"^tiled: {message}"):
        cuneigh.tiled(**arguments)


@pytest.mark.parametrize("quiet", ["0", "1"])
def test_a_terminal_shows_how_far_it_is(quiet, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CUNEIGH_QUIET", quiet)
    cuneigh.tiled(cuneigh.na1d, ARRAY, ARRAY, ARRAY, 3, max_bytes=4096, device="cpu")
    assert ("tiled: tiles" in capsys.readouterr().err) == (quiet == "0")


@pytest.mark.gpu
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tiles_on_a_gpu(border, dtype, monkeypatch):
    """Eight times as much as may be on the GPU, where no more is taken."""
    import cupy

    arrays = np.random.default_rng(0).standard_normal((3, 2, 20, 24, 22, 2, 32)).astype(dtype)
    window = {"kernel_size": (3, 5, 4), "dilation": (1, 1, 2), "border": border}
    if border == "cut":
        window["key_mask"] = arrays[0, ..., 0, 0] < 1
    allocated = []

    class Counted(cupy.cuda.Memory):
        def __init__(self, size):
            allocated.append(size)
            super().__init__(size)

    monkeypatch.setattr(cupy.cuda, "Memory", Counted)
    most = 4 * arrays[0].nbytes // 8
    output, lse = cuneigh.tiled(
        cuneigh.na3d, *arrays, **window, max_bytes=most, device=0, return_lse=True
    )
    assert len(allocated) == 2
    assert sum(allocated) <= most
    wanted, wanted_lse = cuneigh.na3d(*arrays, **window, return_lse=True)
    error = {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(output, wanted, **error)
    np.testing.assert_allclose(lse, wanted_lse, **error)
