"""What a kernel is told of a problem: records that are laid out like the structs of the kernels.

The structs are `Axis` of cuda/cuneigh/window.cuh and `Problem` of cuda/cuneigh/layout.cuh; both
assert the sizes that these records have.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh._problem import Problem
from cuneigh._window import Axis

AXIS_FIELDS = ("length", "key_length", "kernel_size", "stride", "dilation", "is_causal")
AXIS = np.dtype([(name, "i4") for name in AXIS_FIELDS[:-1]] + [("is_causal", "?")], align=True)


def axis_record(axis: Axis) -> tuple[int, ...]:
    """The numbers of one `AXIS`."""
    return tuple(getattr(axis, name) for name in AXIS_FIELDS)


@cache
def problem_type(rank: int) -> np.dtype[Any]:
    """`Problem` of cuda/cuneigh/layout.cuh."""
    return np.dtype(
        [
            ("axes", AXIS, (rank,)),
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
    record["axes"] = [axis_record(axis) for axis in problem.axes]
    record["box"], record["boxes"] = box, boxes
    for name in ("batch", "heads", "group_size", "head_dim", "value_dim", "scale"):
        record[name] = getattr(problem, name)
    record["additional"] = problem.additional or 0
