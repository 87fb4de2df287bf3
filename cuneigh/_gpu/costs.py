"""What planners predict times of: cycles of the parts of a kernel, and blocks beside each other."""

from __future__ import annotations

from typing import NamedTuple

from cuneigh._device import Device
from cuneigh._problem import Problem, size_of

RESERVED = 1024
"""Bytes of each block's shared memory that the driver takes."""


class Cycles(NamedTuple):
    """Cycles that the parts of a kernel take on a multiprocessor.

    They are non-negative least squares fits of measurements, on an H200 (bench/NOTES.md) or by
    `profile --calibrate`.
    """

    product: float
    """A multiply-add of the tensor cores, on one of four schedulers."""
    logit: float
    """One logit's way through the softmax, on one of four schedulers."""
    copy: float
    """Bringing 16 bytes of a column to shared memory."""
    box: float
    """What a block does once for each box of columns that it loads."""
    row: float
    """Reading 16 bytes of a row, or writing as many of a result."""
    block: float
    """What a block does once."""
    mask: float = 0.0
    """Masking one logit, on one of four schedulers."""
    warp: float = 0.0
    """What a block does once for each of its warps."""
    start: float = 0.0
    """Until the first boxes have come, which nothing hides where all blocks begin at once.

    `begun` says how much of it a problem takes.
    """


SMALL_BYTES = 32e6
"""Of all arrays together, so many that multiprocessors wait for memory as a problem begins."""


def begun(problem: Problem) -> float:
    """How much of `Cycles.start` a problem takes: a tenth if its arrays are small, at most all."""
    moved = sum(size_of(spec) for spec in problem.specs if spec is not None)
    return min(0.1 + moved / SMALL_BYTES, 1.0)


def blocks_in_shared_memory(device: Device, bytes_of_block: int) -> int:
    """Blocks of this much shared memory that a multiprocessor holds."""
    return (device.shared_memory + RESERVED) // (bytes_of_block + RESERVED)


CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15}
"""Clusters at work at a time on the 132 multiprocessors of an H200, by their size.

As `cuOccupancyMaxActiveClusters` counts them where a multiprocessor has room for one block:
clusters do not fill the groups of multiprocessors that they are bound to.
"""


def clusters_at_once(blocks: int, size: int) -> int:
    """Clusters of `size` blocks that are at work at a time where there is room for `blocks`."""
    return max(blocks * CLUSTERS[size] // CLUSTERS[1], 1)
