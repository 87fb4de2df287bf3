"""Slots on a GPU: each has memory there, memory of the host that the GPU copies from, and a stream.

What a stream does for a tile comes in this order: its arguments are copied to the GPU, the kernels
run, and the results are copied back. While both streams compute, the host writes the arguments of
the next tile where the one that is ready first copies them from, and then reads its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from cuneigh._call import Call
from cuneigh._device import current
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._problem import Spec
from cuneigh._tiled.slots import ALIGNED, Array, offsets, placed


class GpuSlot:
    """One on a CUDA device, with `size` bytes there for everything that a tile takes.

    `given` and `results` are the bytes of the arguments and of the results of the largest tile.
    """

    def __init__(self, device: int, size: int, given: int, results: int) -> None:
        self._device, self._size = device, size
        with current(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
            self._given, self._host_results = map(_pinned, (given, results))
            self._are_taken = cupy.cuda.Event(disable_timing=True)
        self._taken = 0
        self._results: list[Array] = []

    @property
    def given(self) -> Array:
        self._are_taken.synchronize()
        return self._given

    def start(self, call: Call, specs: Sequence[Spec]) -> None:
        *begins, end = offsets(specs)
        with current(self._device), self._stream, cupy.cuda.using_allocator(self._allocate):
            self._memory.copy_from_host_async(self._given.ctypes.data, end, self._stream)
            self._are_taken.record(self._stream)
            self._taken = end
            arrays = [
                cupy.ndarray(spec.shape, numpy_dtype(spec.dtype), self._memory + begin)
                for spec, begin in zip(specs, begins, strict=True)
            ]
            made = [array for array in call.run(arrays) if array is not None]
            self._results = placed(self._host_results, [s for s in call.results if s is not None])
            for array, host in zip(made, self._results, strict=True):
                array.data.copy_to_host_async(host.ctypes.data, host.nbytes, self._stream)

    def _allocate(self, size: int) -> Any:
        """Memory of a call after what it has taken already, in place of CuPy's pool."""
        size = -(-size // ALIGNED) * ALIGNED
        if self._taken + size > self._size:  # a library takes something that no program mentions
            return cupy.get_default_memory_pool().malloc(size)
        self._taken += size
        return self._memory + (self._taken - size)

    def results(self) -> list[Array]:
        self.wait()
        return self._results

    def wait(self) -> None:
        self._stream.synchronize()


def _pinned(size: int) -> Array:
    """Bytes of the host that a GPU copies from, and to, while the host does something else.

    They are from the pool of CuPy, which keeps them for the next call: making them takes longer
    than filling them does.
    """
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
