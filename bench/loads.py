"""How long a process takes to load a kernel: ``python bench/loads.py``, on a machine with a GPU.

Those of a forward and a backward by `naive` and by `fused`, in the order in which the calls ask for
them. Kernels that are not in the disk cache are compiled, so run it twice: the second time it shows
what a fresh process takes with a warm cache. ``find`` is the time until the cubin is found there,
its checksum compared, and ``load`` that until the driver has a function to launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cupy

import cuneigh
from cuneigh._device import cuda
from cuneigh._jit import Kernel, _load
from cuneigh._measure.provenance import provenance

SHAPE = (1, 14, 14, 4, 32)
WINDOW = 7


def timed(function: Callable[..., Any], times: dict[Kernel, float]) -> Callable[..., Any]:
    """`function` of a kernel, the milliseconds of every call noted."""

    def call(kernel: Kernel, *others: Any) -> Any:
        start = time.perf_counter()
        result = function(kernel, *others)
        times[kernel] = (time.perf_counter() - start) * 1e3
        return result

    return call


def main() -> None:
    about = provenance(cuda(0))
    print(f"commit {about['commit']}, {about['date']}, {about['gpu']}, driver {about['driver']}")
    arrays = [cupy.ones(SHAPE, "float16") for _ in range(3)]
    find: dict[Kernel, float] = {}
    whole: dict[Kernel, float] = {}
    _load.choose = timed(_load.choose, find)
    _load._load = timed(_load._load, whole)
    for backend in ("naive", "fused"):
        output, lse = cuneigh.na2d(*arrays, WINDOW, return_lse=True, backend=backend)
        cuneigh.na2d_backward(output, *arrays, output, lse, WINDOW, backend=backend)
    print(f"{'milliseconds':24s} {'find':>8s} {'load':>8s}")
    for kernel, milliseconds in whole.items():
        print(f"{kernel.name:24s} {find[kernel]:8.2f} {milliseconds - find[kernel]:8.2f}")


if __name__ == "__main__":
    main()
