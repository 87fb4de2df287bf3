"""How a layout is cut in shards over the ranks of a mesh, as users say it and as text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cuneigh._shards.axis import chunks

MeshAxes = str | int | Sequence[str | int] | None
"""Those along which a token axis is cut in shards."""


class Sharding:
    """A layout in shards: each token axis is whole, or cut along axes of a mesh.

    It says the same on all ranks, and all ranks of the mesh must make it together, if several axes
    of the mesh are used: they then form a process group.

    Parameters
    ----------
    mesh : torch.distributed.device_mesh.DeviceMesh
    mesh_axes : sequence
        For each token axis the name or number of the mesh axis along which it is cut, several of
        them (the first is cut first), or None.
    layout : sequence of int, optional
        Tokens of the whole layout along each axis. Shards are then those of ``torch.chunk`` and
        ``DTensor``: equal, but for the last ones.
    sizes : sequence, optional
        For each token axis the tokens of every shard, which may be 0, or None where it is whole.
        Without it and `layout` all shards are as long as that of the call's query.

    Raises
    ------
    TypeError, ValueError
        For an illegal argument. The message names it, the axis and the value.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        mesh_axes: Sequence[MeshAxes],
        *,
        layout: Sequence[int] | None = None,
        sizes: Sequence[Sequence[int] | None] | None = None,
    ) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"Sharding: mesh={mesh!r} is {type(mesh).__name__}, not a DeviceMesh")
        for name, given in (("mesh_axes", mesh_axes), ("layout", layout), ("sizes", sizes)):
            if given is not None and not isinstance(given, (tuple, list)):
                raise TypeError(
                    f"Sharding: {name}={given!r} is {type(given).__name__}; a tuple with an entry "
                    f"for each token axis is needed"
                )
        self.mesh = mesh
        self.mesh_axes = tuple(_numbers(mesh, axis, named) for axis, named in enumerate(mesh_axes))
        used = [number for numbers in self.mesh_axes for number in numbers]
        if len(set(used)) < len(used):
            raise ValueError(
                f"Sharding: mesh_axes={tuple(mesh_axes)!r} has an axis of the mesh twice"
            )
        counts = [[mesh.size(number) for number in numbers] for numbers in self.mesh_axes]
        self.sizes = _sizes(counts, layout, sizes)
        """Of the shards along every token axis; None where a call's query tells."""
        self.text = _text(mesh, self.mesh_axes, self.sizes)
        """All of it that a call needs, on this rank."""

    def __repr__(self) -> str:
        return f"Sharding({self.mesh!r}, {self.mesh_axes}, sizes={self.sizes})"


class Grid(NamedTuple):
    """What `Sharding.text` says."""

    group: str
    """The name of the process group; empty if no axis is cut."""
    order: tuple[int, ...]
    """The group's ranks in the order of the grid of shards, the last token axis changing first."""
    place: int
    """Where in that order this rank is."""
    counts: tuple[int, ...]
    """Shards along every token axis."""
    sizes: tuple[tuple[int, ...] | None, ...]
    """Tokens of each; None if all are as long as this rank's."""


@lru_cache(maxsize=4096)
def grid_of(text: str) -> Grid:
    group, order, place, counts, sizes = json.loads(text)
    known = tuple(None if of_axis is None else tuple(of_axis) for of_axis in sizes)
    return Grid(group, tuple(order), place, tuple(counts), known)


def _numbers(mesh: DeviceMesh, axis: int, named: MeshAxes) -> tuple[int, ...]:
    """The numbers of the mesh axes that `named` has for a token axis."""
    if named is None:
        return ()
    names: tuple[str, ...] = mesh.mesh_dim_names or ()
    found = []
    for one in [named] if isinstance(named, (str, int)) else named:
        if isinstance(one, str) and one in names:
            found.append(names.index(one))
        elif isinstance(one, int) and not isinstance(one, bool) and 0 <= one < mesh.ndim:
            found.append(one)
        else:
            axes = ", ".join(map(repr, names)) or f"0 to {mesh.ndim - 1}"
            raise ValueError(
                f"Sharding: mesh_axes[{axis}]={named!r} is not an axis of the mesh, whose axes are "
                f"{axes}"
            )
    return tuple(found)


def _sizes(
    counts: Sequence[Sequence[int]],
    layout: Sequence[int] | None,
    sizes: Sequence[Sequence[int] | None] | None,
) -> tuple[tuple[int, ...] | None, ...]:
    if layout is not None and sizes is not None:
        raise ValueError("Sharding: layout and sizes were both given; one says all")
    for name, given in ("layout", layout), ("sizes", sizes):
        if given is not None and len(given) != len(counts):
            raise ValueError(
                f"Sharding: {name}={given!r} has {len(given)} entries, but mesh_axes has "
                f"{len(counts)}"
            )
    if layout is not None:
        for axis, length in enumerate(layout):
            _check_size(f"layout[{axis}]", length)
        return tuple(map(chunks, layout, counts))
    if sizes is None:
        return (None,) * len(counts)
    known: list[tuple[int, ...] | None] = []
    for axis, (of_axis, count) in enumerate(zip(sizes, map(math.prod, counts), strict=True)):
        if of_axis is None:
            known.append(None)
            continue
        if not isinstance(of_axis, (tuple, list)):
            raise TypeError(
                f"Sharding: sizes[{axis}]={of_axis!r} is {type(of_axis).__name__}; a tuple with "
                f"the tokens of every shard is needed, or None"
            )
        if len(of_axis) != count:
            raise ValueError(
                f"Sharding: sizes[{axis}]={of_axis!r} has {len(of_axis)} shards, but the mesh has "
                f"{count} ranks along that axis"
            )
        for shard, size in enumerate(of_axis):
            _check_size(f"sizes[{axis}][{shard}]", size)
        known.append(tuple(of_axis))
    return tuple(known)


def _check_size(name: str, size: Any) -> None:
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"Sharding: {name}={size!r} is {type(size).__name__}, not an int")
    if size < 0:
        raise ValueError(f"Sharding: {name}={size!r} must not be negative")


def _text(
    mesh: DeviceMesh,
    mesh_axes: Sequence[tuple[int, ...]],
    sizes: tuple[tuple[int, ...] | None, ...],
) -> str:
    counts = [math.prod(mesh.size(n) for n in numbers) for numbers in mesh_axes]
    used = [number for numbers in mesh_axes for number in numbers]
    if not used:
        return json.dumps(("", (0,), 0, counts, sizes))
    here = mesh.get_coordinate()
    if here is None:
        raise ValueError(f"Sharding: rank {dist.get_rank()} is not in the mesh {mesh}")
    # The ranks that differ from this one along the axes that are used, in the order of the grid
    there = [slice(None) if axis in used else here[axis] for axis in range(mesh.ndim)]
    ranks = mesh.mesh[tuple(there)].permute([sorted(used).index(number) for number in used])
    ranks = ranks.flatten().tolist()
    if len(used) == 1:
        group = mesh.get_group(used[0])
    else:
        group = _group_of(dist.group.WORLD, mesh.device_type, tuple(sorted(ranks)))
    members = dist.get_process_group_ranks(group)
    order = [members.index(rank) for rank in ranks]
    place = order.index(dist.get_rank(group))
    return json.dumps((group.group_name, order, place, counts, sizes))


@lru_cache(maxsize=1024)
def _group_of(world: dist.ProcessGroup, device: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A process group of several axes of a mesh.

    It is none of the mesh's own: once that has axes of which others are made, DTensor moves shards
    by these, and takes shards of shards for even ones.
    """
    timeout = world._get_backend(torch.device(device)).options._timeout
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
