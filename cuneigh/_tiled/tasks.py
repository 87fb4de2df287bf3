"""The calls that compute the tiles of another one, as many as the memory asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cuneigh._call import Call
from cuneigh._device import Device
from cuneigh._frameworks.contract import Adapter
from cuneigh._gpu.arrays import contiguous
from cuneigh._problem import Problem, Spec
from cuneigh._programs import known_backends, program_for
from cuneigh._shards.axis import Range
from cuneigh._shards.plan import Box
from cuneigh._shards.tiles import Sizes, Tile, TooLargeError, tiles_of
from cuneigh._tiled.slots import bytes_of

SLOTS = {"cpu": 1, "cuda": 2}
"""Tiles that are in memory at a time, by the kind of device."""


class Bytes(NamedTuple):
    """What a tile takes on the device."""

    given: int
    results: int
    workspace: int = 0
    """Of kernels. The CPU backend has a limit of its own for that."""


@dataclass(frozen=True)
class Whole:
    """The call that is cut into tiles."""

    name: str
    problem: Problem
    arguments: tuple[str, ...]
    """The names of the arrays given."""
    wants_lse: bool
    device: Device
    adapter: Adapter
    backend: str | None

    def sized(self, sizes: Sizes) -> Problem:
        """The problem of a tile of such sizes, wherever that lies."""
        along = zip(self.problem.axes, sizes.queries, sizes.keys, strict=True)
        axes = (replace(axis, length=n, key_length=m) for axis, n, m in along)
        return replace(self.problem, batch=sizes.batch, axes=tuple(axes))

    def call(self, tile: Tile) -> Call:
        """The call that computes a tile."""
        shapes = Sizes(tile.batch.length, tile.queries.shape, tile.keys.shape)
        starts = ([one.start for one in box.ranges] for box in (tile.queries, tile.keys))
        problem = self.sized(shapes).at(*starts)
        own = "cpu" if self.device.kind == "cpu" else self.device.index
        results = problem.output, problem.lse if self.wants_lse else None
        return Call(self.name, self.adapter, own, self.arguments, problem, self.backend, results)

    def specs(self, problem: Problem) -> list[Spec]:
        """Of the arguments of a tile."""
        return [problem.spec(name) for name in self.arguments]

    def bytes(self, problem: Problem) -> Bytes:
        """What a tile takes, apart from workspace."""
        results = [problem.output, problem.lse][: 1 + self.wants_lse]
        return Bytes(sum(map(bytes_of, self.specs(problem))), sum(map(bytes_of, results)))

    def region(self, name: str, batch: Range, queries: Box, keys: Box) -> tuple[Range, Box]:
        """What of an argument a tile takes."""
        if name == "rpb":
            return Range(0, self.problem.heads), Box(())
        if name.startswith("additional"):
            return batch, Box(())
        return batch, queries if name == "query" else keys


def cut(whole: Whole, max_bytes: int) -> tuple[list[tuple[Tile, Call]], int, Bytes]:
    """The tiles and their calls, how many are in memory at a time, and what one takes at most.

    Raises `TooLargeError` where not even the smallest tiles fit.
    """
    spared = 0  # for workspace, of which only the calls can tell
    while True:
        tiles = _tiles(whole, max_bytes - spared, spared)
        tasks = [(tile, whole.call(tile)) for tile in tiles]
        kinds = {call.problem.anywhere: call for _, call in tasks}
        takes = [_bytes(whole, call) for call in kinds.values()]
        most = Bytes(*map(max, zip(*takes, strict=True)))
        slots = min(SLOTS[whole.device.kind], len(tasks))
        excess = slots * sum(most) - max_bytes
        if excess <= 0:
            return tasks, slots, most
        spared += excess


def _tiles(whole: Whole, most: int, spared: int) -> list[Tile]:
    def take(sizes: Sizes, many: bool) -> int:
        return sum(whole.bytes(whole.sized(sizes))) * (SLOTS[whole.device.kind] if many else 1)

    try:
        return tiles_of(whole.problem.batch, whole.problem.axes, most, take)
    except TooLargeError as error:
        raise TooLargeError(error.args[0] + spared) from None


def _bytes(whole: Whole, call: Call) -> Bytes:
    """What a tile takes; NoBackendError where nothing computes it."""
    problem = call.problem
    takes = whole.bytes(problem)
    if whole.device.kind == "cpu":
        return takes
    layouts = tuple((contiguous(spec.shape), 0) for spec in whole.specs(problem))
    about: tuple[Any, ...] = whole.arguments, call.results, layouts
    where = whole.device.index
    program = program_for(known_backends(), problem.anywhere, where, whole.backend, *about)
    return takes._replace(workspace=sum(map(bytes_of, program.workspace)))
