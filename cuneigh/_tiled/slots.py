"""Where tiles are computed, and on the CPU how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cuneigh._call import Call
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._problem import Spec

ALIGNED = 512
"""Every array of a tile begins at a multiple of as many bytes."""

Array = npt.NDArray[Any]


def bytes_of(spec: Spec) -> int:
    """Bytes that an array takes with others after it."""
    size = math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize
    return -(-size // ALIGNED) * ALIGNED


def offsets(specs: Sequence[Spec]) -> list[int]:
    """Where arrays begin that lie one after another, and where the last one ends."""
    return [*accumulate(map(bytes_of, specs), initial=0)]


def placed(memory: Array, specs: Sequence[Spec]) -> list[Array]:
    """Arrays one after another in an array of bytes."""
    made = []
    for spec, offset in zip(specs, offsets(specs)[:-1], strict=True):
        made.append(np.ndarray(spec.shape, numpy_dtype(spec.dtype), memory, offset))
    return made


class Slot(Protocol):
    """Computes one tile at a time."""

    @property
    def given(self) -> Array:
        """Bytes for the arguments of the next tile, once the call before has taken its own."""

    def start(self, call: Call, specs: Sequence[Spec]) -> None:
        """Begin a call whose arguments are there, one after another."""

    def results(self) -> list[Array]:
        """Wait for the results of the call, and give those that are wanted until the next one."""

    def wait(self) -> None:
        """Wait until no memory of the slot is in use."""


class HostSlot:
    """One on the CPU, which has computed when `start` returns."""

    def __init__(self, size: int) -> None:
        self.given = np.empty(size, np.uint8)
        self._results: list[Array] = []

    def start(self, call: Call, specs: Sequence[Spec]) -> None:
        self._results = call.run(placed(self.given, specs))

    def results(self) -> list[Array]:
        made, self._results = self._results, []
        return [array for array in made if array is not None]

    def wait(self) -> None:
        pass
