"""What a kernel is told of a problem: records that are laid out like the structs of the kernels.

The structs are `WholeAxis` and `PartAxis` of cuda/cuneigh/window.cuh and `Problem` of
cuda/cuneigh/layout.cuh; these files assert the sizes that the records have. Kernels for axes that
are not ordinary (`has_parts`) are compiled with `PARTS` and take records with a `PartAxis` in place
of every `WholeAxis`.

Where parts start is not written into a record: the kernels of a call serve every call that differs
in its starts alone. A launch puts the `start_words` of its call into them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._gpu.arrays import Pointer
from cuneigh._gpu.program import Record
from cuneigh._problem import Problem
from cuneigh._window import BORDERS, Axis, turn_of

PARTS = "CUNEIGH_PARTS"
"""The macro with which kernels are compiled that take parts of a layout, and any border."""

CLUSTERS = "CUNEIGH_CLUSTERS"
"""The macro with which kernels are compiled whose blocks are in clusters (cuneigh/cluster.cuh)."""

AXIS_FIELDS = ("length", "key_length", "kernel_size", "stride", "dilation", "is_causal")
AXIS = np.dtype([(name, "i4") for name in AXIS_FIELDS[:-1]] + [("is_causal", "?")], align=True)
"""`WholeAxis`."""

PART_AXIS = np.dtype(
    [
        *((name, "i4") for name in (*AXIS_FIELDS[:-1], "layout")),
        ("is_causal", "?"),
        ("border", "u1"),
        ("padding", "V6"),
        ("starts", "i8"),
        ("turns", "i8"),
    ]
)
"""`PartAxis`. The words `starts` and `turns` are replaced for every launch."""

START_WORDS = ("starts", "turns")
"""Of an axis, in the order of `start_words`."""

START_OFFSETS = (32, 40)
"""Where these words are in a `PART_AXIS`, in bytes."""

NO_CROSSING = -(1 << 31)
"""`PartAxis::kNoCrossing`."""


def has_parts(problem: Problem) -> bool:
    """Whether kernels must be compiled with `PARTS`."""
    return not all(axis.is_ordinary for axis in problem.axes)


def start_words(problem: Problem) -> tuple[int, ...]:
    """What kernels are told of the starts of parts: nothing where all axes are ordinary."""
    if not has_parts(problem):
        return ()
    return tuple(word for axis in problem.axes for word in _words_of(axis))


def _words_of(axis: Axis) -> tuple[int, int]:
    keys, queries = 0, NO_CROSSING
    if axis.border == "wrap":
        turn = turn_of(axis)
        keys = turn.keys * axis.ring
        queries = turn.queries * axis.ring if turn.crosses else NO_CROSSING
    return _word(axis.query_start, axis.key_start), _word(keys, queries)


def _word(low: int, high: int) -> int:
    """Two 32-bit integers as a signed one of 64 bits."""
    return (high << 32) | (low & 0xFFFFFFFF)


@cache
def axis_type(parts: bool) -> np.dtype[Any]:
    """The record of an axis."""
    return PART_AXIS if parts else AXIS


def fill_axes(record: npt.NDArray[Any], problem: Problem) -> None:
    """Fill the field ``axes`` of a record, apart from where parts start."""
    axes = record["axes"]
    for name in AXIS_FIELDS:
        axes[name] = [getattr(axis, name) for axis in problem.axes]
    if axes.dtype == PART_AXIS:
        axes["layout"] = [axis.layout for axis in problem.axes]
        axes["border"] = [BORDERS.index(axis.border) for axis in problem.axes]


def with_starts(record: npt.NDArray[Any]) -> Record:
    """A record whose first field is ``axes``, as a parameter."""
    type_ = record.dtype["axes"].base
    if type_ != PART_AXIS:
        return Record(record)
    rank = record.dtype["axes"].shape[0]
    places = [
        (axis * type_.itemsize + offset) // 8 for axis in range(rank) for offset in START_OFFSETS
    ]
    # `Program.run` is given the words of the starts after all addresses
    return Record(record, tuple((at, Pointer(i - len(places))) for i, at in enumerate(places)))


@cache
def problem_type(rank: int, parts: bool = False) -> np.dtype[Any]:
    """`Problem` of cuda/cuneigh/layout.cuh."""
    return np.dtype(
        [
            ("axes", axis_type(parts), (rank,)),
            ("box", "i4", (rank,)),
            ("boxes", "i4", (rank,)),
            *((name, "i4") for name in ("batch", "heads", "group_size")),
            *((name, "i4") for name in ("head_dim", "value_dim", "additional")),
            ("scale", "f8"),
        ],
        align=True,
    )


def fill_problem(
    record: npt.NDArray[Any], problem: Problem, box: tuple[int, ...], boxes: tuple[int, ...]
) -> None:
    """Fill a record of `problem_type`: `boxes` boxes of `box` tokens cover the layout."""
    fill_axes(record, problem)
    record["box"], record["boxes"] = box, boxes
    for name in ("batch", "heads", "group_size", "head_dim", "value_dim", "scale"):
        record[name] = getattr(problem, name)
    record["additional"] = problem.additional or 0
