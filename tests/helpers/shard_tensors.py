"""What ranks of `helpers.ranks` run of physicsnemo's ``ShardTensor``, where that is installed."""

from __future__ import annotations

import random
from typing import Any

import torch
from helpers.rank_suites import (
    Case,
    arrays_of,
    close,
    cut,
    differentiate,
    draw_case,
    grids,
    mesh_axes,
    raised,
)
from physicsnemo.domain_parallel import ShardTensor
from physicsnemo.nn.functional import natten
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

import cuneigh
import cuneigh.compat.physicsnemo

EXAMPLES = 6
CALLS = {
    1: (natten.na1d, cuneigh.na1d),
    2: (natten.na2d, cuneigh.na2d),
    3: (natten.na3d, cuneigh.na3d),
}


def shard_tensors(rank: int, world: int) -> None:
    """Every window of NATTEN's on shards of any sizes, with lse, additional keys and gradients."""
    cuneigh.compat.physicsnemo.install()
    draw = random.Random(world)
    for grid, mesh in grids(world):
        for _ in range(EXAMPLES):
            check(natten_case(draw, grid), grid, mesh)
    batch_and_heads(init_device_mesh("cpu", (world,)), world)
    refused(init_device_mesh("cpu", (world,)), rank, world)


def natten_case(draw: random.Random, grid: tuple[int, ...]) -> Case:
    """One whose arguments NATTEN has."""
    while True:
        case = draw_case(draw, grid)
        if set(case.parameters.pop("border")) == {"shift"}:
            return case._replace(has_rpb=False, has_mask=False)


def sharded(whole: torch.Tensor, mesh: DeviceMesh, cuts: dict[int, tuple[int, ...]]) -> ShardTensor:
    """`whole`, cut along its axes as `cuts` says in the order of the axes of the mesh."""
    shapes, local = {}, whole
    place = mesh.get_coordinate()
    for number, (axis, sizes) in enumerate(cuts.items()):
        start = sum(sizes[: place[number]])
        local = local.narrow(axis, start, sizes[place[number]])
    for number, (axis, sizes) in enumerate(cuts.items()):
        shapes[number] = tuple(
            tuple(size if i == axis else length for i, length in enumerate(local.shape))
            for size in sizes
        )
    placements = [Shard(axis) for axis in cuts]
    leaf = ShardTensor.from_local(local.clone(), mesh, placements, shapes)
    return leaf.detach().requires_grad_()


def check(case: Case, grid: tuple[int, ...], mesh: DeviceMesh) -> None:
    """A call and all of its gradients against one of the whole layout."""
    pairs = zip(mesh_axes(grid), case.sizes, strict=True)
    cuts = {1 + axis: sizes for axis, (name, sizes) in enumerate(pairs) if name is not None}
    compare(case, mesh, cuts)


def compare(case: Case, mesh: DeviceMesh, cuts: dict[int, tuple[int, ...]]) -> None:
    arrays = {name: array.requires_grad_() for name, array in arrays_of(case).items()}
    cut_arrays: dict[str, Any] = {
        # Others are plain tensors that all ranks have: parameters of a model
        name: sharded(array.detach(), mesh, cuts)
        if name in ("query", "key", "value")
        else array.detach().clone().requires_grad_()
        for name, array in arrays.items()
    }
    call, whole = CALLS[len(case.layout)]
    expected = whole(**arrays, **case.parameters, return_lse=True)
    query, key, value, *rest = cut_arrays.values()
    names = dict(zip([*cut_arrays][3:], rest, strict=True))
    got = call(query, key, value, **names, **case.parameters, return_lse=True)
    incoming = [torch.randn_like(one) for one in expected]
    for one, gradient in zip(expected, incoming, strict=True):
        gradient[one.isinf()] = 0
    differentiate(expected, incoming)
    differentiate(got, [sharded(one, mesh, cuts).detach() for one in incoming])
    for one, reference in zip(got, expected, strict=True):
        assert isinstance(one, ShardTensor)
        of_rank = sharded(reference.detach(), mesh, cuts).to_local()
        close(one.to_local(), of_rank, (case, cuts))
        assert one.shape == reference.shape, (one.shape, reference.shape)
    for name, array in cut_arrays.items():
        gradient, reference = array.grad, arrays[name].grad
        if isinstance(array, ShardTensor):
            gradient = gradient.to_local()
            reference = sharded(reference, mesh, cuts).to_local()
        close(gradient, reference, (case, cuts, name))


def batch_and_heads(mesh: DeviceMesh, world: int) -> None:
    """Shards of the batch, and of heads that share key heads evenly, need no exchange."""
    draw = random.Random(world)
    case = Case((5, 6), ((5,), (6,)), {"kernel_size": (2, 3)}, (4, 4), False, 2, False)
    compare(case, mesh, {0: cut(draw, 2, world)})
    compare(case, mesh, {3: cut(draw, 4, world)})


def refused(mesh: DeviceMesh, rank: int, world: int) -> None:
    """What nothing but a gather would serve, and what NATTEN has no counterpart for."""
    sizes, others = (2,) * world, (1, *(2,) * (world - 2), 3)
    whole = torch.ones(1, 2 * world, 2, 4)
    query, key = sharded(whole, mesh, {1: sizes}), sharded(whole, mesh, {1: others})
    message = raised(lambda: natten.na1d(query, key, key, 3))
    expected = f"ValueError: na1d: key has shards of {list(others)} along axis 0 of the mesh, but"
    assert message.startswith(expected), message
    message = raised(lambda: natten.na1d(query, whole, whole, 3, attention_kwargs={"odd": 1}))
    assert message.startswith("NotImplementedError: natten.na1d: attention_kwargs['odd']"), message
    message = raised(lambda: natten.na1d(whole, query, query, 3))
    assert "key has placement S(1) along axis 0 of the mesh, along which query has R" in message
    whole_keys = natten.na1d(query, whole, whole, 3)
    close(whole_keys.to_local(), torch.ones(1, 2, 2, 4), "replicated keys", 1e-6)
