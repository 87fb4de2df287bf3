"""From the arguments of a public function to its results: local tensors of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.distributed_c10d import _resolve_process_group

from cuneigh._backends import unknown
from cuneigh._frameworks import adapter_of
from cuneigh._frameworks.arguments import examine
from cuneigh._parameters import boolean, part_arguments, scale_or_default, window_arguments
from cuneigh._problem import ARRAYS, OPTIONAL, Spec
from cuneigh._validate import problem_of
from cuneigh.torch.distributed._agreement import agreement_of
from cuneigh.torch.distributed._operators import SHARDED
from cuneigh.torch.distributed._sharding import Grid, grid_of
from cuneigh.torch.distributed._task import Task


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def attend(parameters: tuple[Any, ...], sharding: str, *arrays: Any) -> list[Any]:
    """Output and lse of a call on one rank; None for lse unless it is wanted.

    `parameters` are

        rank, kernel_size, stride, dilation, is_causal, scale, return_lse, backend, border

    `sharding` is `Sharding.text`, and `arrays` are those of the operation "forward".
    """
    grid = grid_of(sharding)
    try:
        task, given, return_lse = _checked(parameters, grid, arrays)
    except (TypeError, ValueError, RuntimeError) as error:
        if grid.group and not torch.compiler.is_compiling():
            agreement_of(group_of(grid.group)).refuse(error)
        raise
    output, lse, *_ = SHARDED(*given, task.encoded())
    return [output, lse if return_lse else None]


def _checked(parameters: tuple[Any, ...], grid: Grid, arrays: Any) -> tuple[Task, list[Any], bool]:
    """The task, its arrays, and whether lse is wanted, of a call that is legal."""
    rank, kernel_size, stride, dilation, is_causal, scale, return_lse, backend, border = parameters
    name = f"na{rank}d"
    named = zip(ARRAYS["forward"].arguments, arrays, strict=True)
    needed = {n: array for n, array in named if array is not None or n not in OPTIONAL}
    adapter, _ = examine(name, needed, adapter_of)
    _refuse_tangents(name, needed)
    given = adapter.converted(name, needed)
    specs = {n: adapter.spec(array) for n, array in given.items()}
    window = window_arguments(name, rank, kernel_size, stride, dilation, is_causal)
    sizes = _sizes(name, rank, grid, specs)
    place = np.unravel_index(grid.place, grid.counts)
    starts = tuple(sum(of_axis[:shard]) for of_axis, shard in zip(sizes, place, strict=True))
    part = part_arguments(name, rank, border, tuple(map(sum, sizes)), starts, starts)
    problem = problem_of(name, "forward", specs, window, scale_or_default(name, scale), part)
    return_lse = boolean(name, "return_lse", return_lse)
    if reason := unknown(backend):
        raise ValueError(f"{name}: {reason}")
    task = Task(
        name,
        *window,
        tuple(axis.border for axis in problem.axes),
        problem.scale,
        backend,
        *(grid.group, grid.order, grid.place),
        sizes,
    )
    return task, [given.get(n) for n in ARRAYS["forward"].arguments], return_lse


def _refuse_tangents(name: str, arrays: Mapping[str, Any]) -> None:
    """Raise for an array that would lose a derivative."""
    if forward_ad._current_level < 0:
        return
    for argument, array in arrays.items():
        if forward_ad.unpack_dual(array).tangent is not None:
            raise RuntimeError(
                f"{name}: {argument} takes part in automatic differentiation in forward mode, "
                f"which calls on shards do not support; differentiate in reverse mode"
            )


def _sizes(
    name: str, rank: int, grid: Grid, specs: Mapping[str, Spec]
) -> tuple[tuple[int, ...], ...]:
    """Of all shards along every token axis; ValueError if those of this rank are others."""
    if len(grid.counts) != rank:
        raise ValueError(
            f"{name}: sharding has {len(grid.counts)} token axes, but there are {rank}"
        )
    found = []
    place = np.unravel_index(grid.place, grid.counts)
    for axis, (count, sizes, shard) in enumerate(zip(grid.counts, grid.sizes, place, strict=True)):
        for argument in ("query", "key", "value", "key_mask"):
            shape = specs[argument].shape if argument in specs else ()
            if len(shape) <= 1 + axis:
                continue  # not given; or an error of its own
            length = int(shape[1 + axis])
            if sizes is None:
                sizes = (length,) * count
            elif length != sizes[shard]:
                raise ValueError(
                    f"{name}: {argument} has size {length} on axis {1 + axis}, but shard {shard} "
                    f"along token axis {axis} has {sizes[shard]} tokens of {list(sizes)}"
                )
        found.append(sizes or ())
    return tuple(found)


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    return _resolve_process_group(name)
