"""Calls on tensors of type ``DTensor``: taken apart into local ones, and results put together."""

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
    return any(isinstance(array, DTensor) for array in arrays)


def unwrapped(call: str, rank: int, arrays: tuple[Any, ...]) -> tuple[Recipe, tuple[Any, ...]]:
    """The recipe of a call, and its local tensors."""
    query = arrays[0]
    for name, array in zip(Operands._fields, arrays, strict=True):
        if array is not None and not isinstance(array, DTensor):
            raise TypeError(
                f"{call}: {name} is of type {type_name(array)} beside arguments that are DTensor: "
                f"all must be; DTensor.from_local(.., run_check=False) makes one"
            )
        if array is not None and array.device_mesh != query.device_mesh:
            raise ValueError(
                f"{call}: {name} is on {array.device_mesh}, but query is on {query.device_mesh}"
            )
    given = tuple(
        [None if array is None else (_numbers(array.shape), array.placements) for array in arrays]
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


def _local(array: DTensor, taken: Taken) -> torch.Tensor:
    local: torch.Tensor = array.to_local(grad_placements=taken.gradients)
    for axis, start, length in taken.ranges:
        local = local.narrow(axis, start, length)
    if taken.heads is not None:
        local = local.index_select(-2, torch.tensor(taken.heads, device=local.device))
    return local


def wrapped(local: torch.Tensor, query: DTensor, shape: tuple[int, ...]) -> DTensor:
    """A result, cut as the query is: inferred from local shapes, `shape` would be a wrong one."""
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
    layout = arguments["query"].shape[1 : 1 + rank]
    sharding = "" if is_local else Sharding(mesh, placed.token_axes, layout=layout).text
    return Recipe(taken, sharding, placed.starts(place))
