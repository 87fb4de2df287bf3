"""All tiles of a call in their order: arguments in, results out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from cuneigh._progress import counting
from cuneigh._shards.tiles import Tile
from cuneigh._tiled.boxes import Copies
from cuneigh._tiled.slots import HostSlot, Slot, placed
from cuneigh._tiled.tasks import Bytes, Whole, cut

Array = npt.NDArray[Any]


def run(whole: Whole, arrays: Mapping[str, Array], results: Sequence[Array], most: int) -> None:
    """Fill `results`, the output and perhaps the lse, in at most `most` bytes on the device.

    Raises `TooLargeError` where not even the smallest tiles fit.
    """
    tasks, count, size = cut(whole, most)
    slots = [_slot(whole, size) for _ in range(count)]
    busy: dict[int, Tile] = {}

    with counting(f"{whole.name}: tiles", len(tasks)) as advance, Copies() as copies:

        def finish(number: int) -> None:
            tile = busy.pop(number)
            for made, target in zip(slots[number].results(), results, strict=True):
                copies.scatter(made, tile.batch, tile.queries, target)
            advance()

        try:
            for i, (tile, call) in enumerate(tasks):
                number = i % count
                specs = whole.specs(call.problem)
                for name, target in zip(
                    whole.arguments, placed(slots[number].given, specs), strict=True
                ):
                    copies.gather(arrays[name], *whole.region(name, *tile), target)
                if number in busy:
                    finish(number)
                busy[number] = tile
                slots[number].start(call, specs)
            for number in list(busy):
                finish(number)
        finally:
            for slot in slots:  # whose memory goes now
                slot.wait()


def _slot(whole: Whole, size: Bytes) -> Slot:
    if whole.device.kind == "cpu":
        return HostSlot(size.given)
    from cuneigh._tiled.gpu import GpuSlot

    return GpuSlot(whole.device.index, sum(size), size.given, size.results)
