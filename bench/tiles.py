"""What a layout in host memory costs that is computed in tiles, beside one call on all of it.

    python bench/tiles.py --output bench/results/tiles.json

The arrays of a layout, its output included, are 8 times larger than what `cuneigh.tiled` may take
on the GPU. Asked for is 1.05 times what one call needs for the visible pairs of all tiles, and the
copies that nothing hides: those of the first arguments and of the last results, and what copies
take longer than computing. All copies are timed alone, by the same tiles with kernels left out.
Results are compared with those of one call.

`--cpu` runs small layouts on the CPU, to try the script: nothing hides copies there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import cuneigh
from cuneigh._call import Call
from cuneigh._device import CPU, cuda
from cuneigh._frameworks.contract import numpy_dtype
from cuneigh._measure.arrays import float64, normal
from cuneigh._measure.clock import CpuClock, GpuClock
from cuneigh._measure.provenance import provenance
from cuneigh._tiled import computing

CASES = {
    "small windows": ("bfloat16", (64, 128, 256), (9, 17, 17)),
    "large windows": ("float32", (64, 128, 256), (17, 33, 33)),
}
"""Copies take longer than computing, and the other way round."""
SMALL = {name: (dtype, (16, 16, 16), (3, 5, 5)) for name, (dtype, *_) in CASES.items()}
HEADS, DIM = 1, 64
TIMES = 8
"""How much larger the arrays are than what tiles may take."""
TURNS = 3
MOST = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--cpu", action="store_true", help="small layouts on the CPU")
    options = parser.parse_args()
    device = CPU if options.cpu else cuda(0)
    document: dict[str, Any] = {**provenance(device), "cases": {}}
    for name, case in (SMALL if options.cpu else CASES).items():
        document["cases"][name] = figures = measure(*case, options.cpu)
        print(f"{name}: {figures}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(
    dtype: str, layout: Sequence[int], kernel_size: Sequence[int], on_cpu: bool
) -> dict[str, Any]:
    xp, clock = (np, CpuClock()) if on_cpu else _gpu()
    one_s, wanted, arrays = one_call(xp, clock, dtype, layout, kernel_size)
    most = 4 * arrays[0].nbytes // TIMES
    output, tiles = np.empty_like(arrays[0]), []

    def run() -> None:
        where: Any = "cpu" if on_cpu else 0
        cuneigh.tiled(cuneigh.na3d, *arrays, kernel_size, max_bytes=most, out=output, device=where)

    cut = computing.cut

    def noted(*arguments: Any) -> Any:
        found = cut(*arguments)
        tiles.extend(found[0])
        return found

    with mock.patch.object(computing, "cut", noted):
        run()
    check(output, wanted)
    del wanted
    tiled_s = median_of(run)
    with mock.patch.object(Call, "run", lambda call, arrays: results_of(xp, call)):
        copies_s = median_of(run)
    pairs = sum(call.problem.visible_pairs() for _, call in tiles)
    whole = math.prod(layout) * HEADS * math.prod(kernel_size)
    computing_s = one_s * pairs / whole
    alone = copies_s / len(tiles)  # the first arguments and the last results
    limit = MOST * computing_s + max(copies_s - computing_s, alone)
    return {
        "tiled_s": round(tiled_s, 4),
        "limit_s": round(limit, 4),
        "one_call_s": round(one_s, 4),
        "copies_s": round(copies_s, 4),
        "tiles": len(tiles),
        "max_bytes": most,
        "copied_bytes": sum(bytes_of(call) for _, call in tiles),
        "pairs_per_s": round(pairs / tiled_s),
        "pairs_per_s_of_one_call": round(whole / one_s),
        "times_pairs_of_one_call": round(pairs / whole, 4),
    }


def one_call(
    xp: Any, clock: Any, dtype: str, layout: Sequence[int], kernel_size: Sequence[int]
) -> tuple[float, Any, list[Any]]:
    """The seconds of one call, its output, and its arguments on the host."""
    given = [normal(xp, (1, *layout, HEADS, DIM), dtype, seed) for seed in range(3)]
    ms = clock.measure(lambda: cuneigh.na3d(*given, kernel_size), 600.0).best
    output = cuneigh.na3d(*given, kernel_size)
    return ms / 1e3, output, given if xp is np else [array.get() for array in given]


def _gpu() -> tuple[Any, GpuClock]:
    import cupy

    return cupy, GpuClock()


def results_of(xp: Any, call: Call) -> list[Any]:
    """Arrays that nothing fills."""
    return [spec and xp.empty(spec.shape, numpy_dtype(spec.dtype)) for spec in call.results]


def bytes_of(call: Call) -> int:
    """Of the arguments and results of a tile."""
    specs = [*map(call.problem.spec, call.arguments), *filter(None, call.results)]
    return sum(math.prod(spec.shape) * numpy_dtype(spec.dtype).itemsize for spec in specs)


def median_of(call: Callable[[], Any]) -> float:
    """Seconds of a warm call."""
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(output: Any, wanted: Any) -> None:
    """Raise unless every fifth plane of two outputs agrees as far as rounding allows."""
    for plane in range(0, output.shape[1], 5):
        first, second = float64(output[0, plane]), float64(wanted[0, plane])
        error, largest = abs(first - second).max(), abs(second).max()
        assert error <= 0.02 * largest, f"wrong by {error}"


if __name__ == "__main__":
    main()
