"""Calls on tensors that say how they are sharded: taken apart, and results put together.

They are of type ``DTensor``, or ``ShardTensor`` of physicsnemo, whose shards have any sizes.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from operator import index, mul
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from cuneigh._frameworks.contract import type_name
from cuneigh._problem import Operands
from cuneigh.torch.distributed._placements import Given, Placed, Taken
from cuneigh.torch.distributed._sharding import Sharding


class Recipe(NamedTuple):
    """What a rank does with the arguments of a call."""

    taken: tuple[Taken | None, ...]
    """In the order of `Operands`; None for those not given."""
    sharding: str
    """That of the token axes; empty if no keys of other ranks are needed."""
    query_start: tuple[int, ...]


def has_dtensor(arrays: tuple[Any, ...]) -> bool:
    return any(map(_is_sharded, arrays))


def _is_sharded(array: Any) -> bool:
    return isinstance(array, DTensor) or _shapes_of(array) is not None


def _shapes_of(array: Any) -> Any:
    """The method of a ``ShardTensor`` that has the shapes of all shards; None of other tensors."""
    return getattr(getattr(array, "_spec", None), "sharding_shapes", None)


def _sizes_of(array: Any) -> tuple[tuple[int, ...] | None, ...] | None:
    """Of the shards along every axis of the mesh; None for those of ``torch.chunk``."""
    shapes_of = _shapes_of(array)
    if shapes_of is None:
        return None
    shapes = shapes_of()
    return tuple(
        tuple(shape[placement.dim] for shape in shapes[number]) if placement.is_shard() else None
        for number, placement in enumerate(array.placements)
    )


def unwrapped(call: str, rank: int, arrays: tuple[Any, ...]) -> tuple[Recipe, tuple[Any, ...]]:
    """The recipe of a call, and its local tensors."""
    query = arrays[0]
    for name, array in zip(Operands._fields, arrays, strict=True):
        if array is not None and not _is_sharded(array):
            raise TypeError(
                f"{call}: {name} is of type {type_name(array)} beside arguments that are DTensor: "
                f"all must be; DTensor.from_local(.., run_check=False) makes one"
            )
        if array is not None and array.device_mesh != query.device_mesh:
            raise ValueError(
                f"{call}: {name} is on {array.device_mesh}, but query is on {query.device_mesh}"
            )
    given = tuple(
        [
            None
            if array is None
            else (_numbers(array.shape), tuple(array.placements), _sizes_of(array))
            for array in arrays
        ]
    )
    recipe = _recipe(query.device_mesh, call, rank, given)
    local = tuple(
        None if array is None else _local(array, of)
        for array, of in zip(arrays, recipe.taken, strict=True)
    )
    return recipe, local


def _numbers(shape: torch.Size) -> tuple[int, ...]:
    """The shape in numbers, also where a program is compiled for sizes that are symbols."""
    return tuple([index(size) for size in shape])


def _local(array: Any, taken: Taken) -> torch.Tensor:
    local: torch.Tensor = array.to_local(grad_placements=taken.gradients)
    for axis, start, length in taken.ranges:
        local = local.narrow(axis, start, length)
    if taken.heads is not None:
        local = local.index_select(-2, torch.tensor(taken.heads, device=local.device))
    return local


def wrapped(local: torch.Tensor, query: Any, shape: tuple[int, ...]) -> Any:
    """A result, cut as the query is: inferred from local shapes, `shape` would be a wrong one."""
    shapes_of = _shapes_of(query)
    if shapes_of is not None:
        rest = shape[query.ndim - 1 :]
        shapes = {
            number: tuple((*of[: query.ndim - 1], *rest) for of in along)
            for number, along in shapes_of().items()
        }
        return type(query).from_local(local, query.device_mesh, query.placements, shapes)
    strides = [*accumulate(reversed(shape[1:]), mul, initial=1)]
    return DTensor.from_local(
        local,
        query.device_mesh,
        query.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(reversed(strides)),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recipe(mesh: Any, call: str, rank: int, given: tuple[Any, ...]) -> Recipe:
    # A program that is being compiled has the mesh in a box of its own.
    return _recipe_of(getattr(mesh, "real_obj", mesh), call, rank, given)


@lru_cache(maxsize=4096)
def _recipe_of(mesh: DeviceMesh, call: str, rank: int, given: tuple[Any, ...]) -> Recipe:
    named = zip(Operands._fields, given, strict=True)
    arguments = {name: Given(*of) for name, of in named if of is not None}
    placed = Placed(call, rank, mesh, arguments)
    place = mesh.get_coordinate()
    if place is None:
        raise ValueError(f"{call}: this rank is not in the mesh {mesh} of query")
    taken = tuple(
        placed.taken(name, place) if name in arguments else None for name in Operands._fields
    )
    is_local = placed.has_whole_keys or not any(placed.token_axes)
    sharding = "" if is_local else Sharding(mesh, placed.token_axes, sizes=placed.token_sizes).text
    return Recipe(taken, sharding, placed.starts(place))
