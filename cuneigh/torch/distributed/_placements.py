"""What a rank takes of arguments of type ``DTensor``, from their placements alone.

Each axis of the mesh cuts the query along its batch, one of its token axes or its heads, or not at
all. Every other argument is cut alike along that axis of the mesh, or replicated; then this rank
takes of it what its queries meet, and the gradient of the whole is the sum over the ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

from cuneigh._shards.axis import Range, chunk, chunks

Role = int | Literal["batch", "heads"]
"""What an axis of the query is; token axes have numbers."""

KEYS = "key", "value", "key_mask"
"""The arguments with the tokens of the keys."""


class Given(NamedTuple):
    """An argument as all ranks know it."""

    shape: tuple[int, ...]
    placements: tuple[Any, ...]
    sizes: tuple[tuple[int, ...] | None, ...] | None = None
    """Of the shards along every axis of the mesh; None if they are those of ``torch.chunk``."""

    def lengths(self, number: int, count: int) -> tuple[int, ...]:
        """The sizes of the shards along an axis of the mesh that alone cuts an axis of these."""
        known = self.sizes and self.sizes[number]
        return known or chunks(self.shape[self.placements[number].dim], [count])


class Taken(NamedTuple):
    """What a rank does with its local tensor of an argument, to have what its queries meet."""

    gradients: tuple[Any, ...]
    """The placements of the gradient."""
    ranges: tuple[tuple[int, int, int], ...]
    """Axes that are narrowed: the axis, the start and the length."""
    heads: tuple[int, ...] | None
    """Key heads that are picked, one for each query head; None where all have the same number."""


class Placed:
    """The arguments of one call, and how the mesh cuts them."""

    def __init__(
        self, call: str, rank: int, mesh: DeviceMesh, arguments: Mapping[str, Given]
    ) -> None:
        self._call, self._rank, self._mesh, self._arguments = call, rank, mesh, arguments
        self._check()

    @cached_property
    def cut(self) -> tuple[Role | None, ...]:
        """What every axis of the mesh cuts of the query; None where the query is replicated."""
        by_axis = {axis: role for role, axis in self._axes("query").items()}
        found: list[Role | None] = []
        for number, placement in enumerate(self._arguments["query"].placements):
            if type(placement) is Replicate:
                found.append(None)
            elif type(placement) is Shard and placement.dim in by_axis:
                found.append(by_axis[placement.dim])
            else:
                raise ValueError(
                    f"{self._call}: query has placement {placement} along {self._named(number)}, "
                    f"but Replicate(), or Shard of its batch (0), tokens (1 to {self._rank}) or "
                    f"heads ({1 + self._rank}) is needed"
                )
        return tuple(found)

    @cached_property
    def token_axes(self) -> tuple[tuple[int, ...], ...]:
        """The mesh axes that cut each token axis of the query."""
        return tuple(
            tuple(number for number, role in enumerate(self.cut) if role == axis)
            for axis in range(self._rank)
        )

    @cached_property
    def has_whole_keys(self) -> bool:
        """Whether every rank has the keys of all tokens, though its queries are cut."""
        numbers = {number for numbers in self.token_axes for number in numbers}
        return bool(numbers) and all(
            type(self._arguments[name].placements[number]) is Replicate
            for name in KEYS
            if name in self._arguments
            for number in numbers
        )

    @property
    def token_sizes(self) -> tuple[tuple[int, ...] | None, ...]:
        """The sizes of all shards along each token axis of the query; None where it is whole."""
        return tuple(
            tuple(self._shards("query", 1 + axis, numbers)) if numbers else None
            for axis, numbers in enumerate(self.token_axes)
        )

    def _shards(self, name: str, axis: int, numbers: Sequence[int]) -> Iterator[int]:
        """The sizes of the shards that some axes of the mesh make of an axis of an argument."""
        for cut in itertools.product(*(range(self._mesh.size(number)) for number in numbers)):
            place = [0] * self._mesh.ndim
            for number, shard in zip(numbers, cut, strict=True):
                place[number] = shard
            yield self._extent(name, axis, place).length

    def starts(self, place: Sequence[int]) -> tuple[int, ...]:
        """The first token of the queries of the rank at a place of the mesh."""
        return tuple(self._extent("query", 1 + axis, place).start for axis in range(self._rank))

    def taken(self, name: str, place: Sequence[int]) -> Taken:
        """What the rank at a place of the mesh takes of an argument."""
        gradients = tuple(
            Partial() if type(placement) is Replicate and role is not None else placement
            for role, placement in zip(self.cut, self._arguments[name].placements, strict=True)
        )
        ranges, heads = [], None
        for role, axis in self._axes(name).items():
            has = self._extent(name, axis, place)
            if name == "query" or (isinstance(role, int) and self.has_whole_keys):
                continue
            if role == "heads" and name != "rpb":
                wanted = self._key_heads(place)
                first = wanted[0] if wanted else has.start
                if wanted == list(range(first, first + len(wanted))):
                    needs = Range(first, first + len(wanted))
                else:
                    needs, heads = has, tuple(head - has.start for head in wanted)
            else:
                needs = self._extent("query", self._axes("query")[role], place)
            if needs != has:
                ranges.append((axis, needs.start - has.start, needs.length))
        return Taken(gradients, tuple(ranges), heads)

    def _axes(self, name: str) -> dict[Role, int]:
        """The axes of an argument by their roles."""
        if name == "rpb":
            return {"heads": 0}
        if name.startswith("additional"):
            return {"batch": 0, "heads": 2}
        tokens: dict[Role, int] = {axis: 1 + axis for axis in range(self._rank)}
        heads: dict[Role, int] = {} if name == "key_mask" else {"heads": 1 + self._rank}
        return {"batch": 0, **tokens, **heads}

    def _named(self, number: int) -> str:
        names = self._mesh.mesh_dim_names
        return f"axis {names[number]!r} of the mesh" if names else f"axis {number} of the mesh"

    def _extent(self, name: str, axis: int, place: Sequence[int]) -> Range:
        """What the rank at a place of the mesh has of an axis of an argument."""
        given = self._arguments[name]
        found = Range(0, given.shape[axis])
        for number, placement in enumerate(given.placements):
            if type(placement) is not Shard or placement.dim != axis:
                continue
            shard, count = place[number], self._mesh.size(number)
            if given.sizes is None:
                found = chunk(found, count, shard)
            else:
                lengths = given.lengths(number, count)
                start = sum(lengths[:shard])
                found = Range(start, start + lengths[shard])
        return found

    def _key_heads(self, place: Sequence[int]) -> list[int]:
        """The key heads that the query heads of a rank read.

        Query heads that are neighbors share them evenly, or there is one for each query head.
        """
        axis = self._axes("query")["heads"]
        heads = self._extent("query", axis, place)
        all_heads, key_heads = (self._arguments[name].shape[axis] for name in ("query", "key"))
        if not heads.length or not key_heads:
            return []
        group = all_heads // key_heads
        read = [head // group for head in range(*heads)]
        shared = sorted(set(read))
        is_even = all(read.count(head) * len(shared) == len(read) for head in shared)
        return shared if is_even else read

    def _check(self) -> None:
        """Raise unless all arguments are cut as the query is, or replicated."""
        for name, given in self._arguments.items():
            shape, placements, _ = given
            if len(shape) <= max(self._axes(name).values()):
                raise ValueError(
                    f"{self._call}: {name} has {len(shape)} axes: {name}.shape is {shape}"
                )
            tokens = slice(1, 1 + self._rank)
            if name in KEYS and shape[tokens] != self._arguments["query"].shape[tokens]:
                raise ValueError(
                    f"{self._call}: {name} has {shape[tokens]} tokens, but query has "
                    f"{self._arguments['query'].shape[tokens]}"
                )
            for number, placement in enumerate(placements):
                role = self.cut[number]
                alike = None if role is None else self._axes(name).get(role)
                if type(placement) is Replicate:
                    continue
                if type(placement) is not Shard or placement.dim != alike:
                    legal = "Replicate()" if alike is None else f"Shard({alike}) or Replicate()"
                    of_query = self._arguments["query"].placements[number]
                    raise ValueError(
                        f"{self._call}: {name} has placement {placement} along "
                        f"{self._named(number)}, along which query has {of_query}: {legal} is "
                        f"needed"
                    )
                if role != "heads" or name in ("query", "rpb"):
                    self._check_sizes(name, number)
            self._check_order(name, placements)
            self._check_key_heads(name)

    def _check_sizes(self, name: str, number: int) -> None:
        """Raise where shards of any sizes are not those of the query."""
        given, of_query = (self._arguments[one] for one in (name, "query"))
        if given.sizes is None and of_query.sizes is None:
            return
        dim, count = given.placements[number].dim, self._mesh.size(number)
        for other, placement in enumerate(given.placements[:number]):
            if type(placement) is Shard and placement.dim == dim:
                raise ValueError(
                    f"{self._call}: {name} is sharded on axis {dim} along {self._named(other)} and "
                    f"along {self._named(number)}: one of them may cut it, unless it is a DTensor"
                )
        lengths, needed = (one.lengths(number, count) for one in (given, of_query))
        if lengths != needed:
            raise ValueError(
                f"{self._call}: {name} has shards of {list(lengths)} along {self._named(number)}, "
                f"but query has {list(needed)}"
            )

    def _check_order(self, name: str, placements: Sequence[Any]) -> None:
        """Raise where a shard does not hold the query's: cut again by a later axis of the mesh."""
        for role in self._axes(name):
            numbers = [number for number, cut in enumerate(self.cut) if cut == role]
            for first, second in itertools.pairwise(numbers):
                if type(placements[first]) is Replicate and type(placements[second]) is Shard:
                    raise ValueError(
                        f"{self._call}: {name} is sharded along {self._named(second)}, but not "
                        f"along {self._named(first)}, though both cut query on the same axis: "
                        f"Replicate() along {self._named(second)} is needed"
                    )

    def _check_key_heads(self, name: str) -> None:
        """Raise unless every rank, not only this one, has the key heads that its queries read."""
        axis = self._axes(name).get("heads")
        numbers = [number for number, role in enumerate(self.cut) if role == "heads"]
        if axis is None or name in ("query", "rpb"):
            return
        for cut in itertools.product(*(range(self._mesh.size(number)) for number in numbers)):
            place = [0] * self._mesh.ndim
            for number, shard in zip(numbers, cut, strict=True):
                place[number] = shard
            has, wanted = self._extent(name, axis, place), self._key_heads(place)
            if any(not has.start <= head < has.stop for head in wanted):
                raise ValueError(
                    f"{self._call}: {name} is sharded on its heads along "
                    f"{self._named(numbers[-1])}, and shard {cut[-1]} has heads {has.start} to "
                    f"{has.stop - 1}, but its queries read heads {wanted[0]} to {wanted[-1]}: "
                    f"Replicate() is needed"
                )
