"""What ranks of `helpers.ranks` run of tensors that say how long each of their shards is.

physicsnemo's ``ShardTensor`` is one, which `helpers.shard_tensors` tries where it is installed.
Here is a stand-in that has what cuneigh asks of one.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers.rank_suites import close, raised
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import cuneigh
from cuneigh.torch import distributed


class Uneven:
    """A tensor of which each rank has a shard of a size of its own."""

    def __init__(self, local: torch.Tensor, mesh: DeviceMesh, placements: Any, shapes: Any) -> None:
        self.local, self.device_mesh, self.placements = local, mesh, tuple(placements)
        self._shapes, self._spec = shapes, self
        self.gradients: Any = None

    from_local = classmethod(lambda cls, *given: cls(*given))

    def sharding_shapes(self) -> Any:
        return self._shapes

    @property
    def ndim(self) -> int:
        return self.local.ndim

    @property
    def shape(self) -> torch.Size:
        shape = list(self.local.shape)
        for number, shapes in self._shapes.items():
            axis = self.placements[number].dim
            shape[axis] = sum(one[axis] for one in shapes)
        return torch.Size(shape)

    def to_local(self, grad_placements: Any = None) -> torch.Tensor:
        self.gradients = grad_placements
        return self.local


def cut(whole: torch.Tensor, mesh: DeviceMesh, axis: int, sizes: tuple[int, ...]) -> Uneven:
    rank = mesh.get_local_rank()
    local = whole.detach().narrow(axis, sum(sizes[:rank]), sizes[rank]).clone().requires_grad_()
    shapes = tuple(
        tuple(size if i == axis else length for i, length in enumerate(whole.shape))
        for size in sizes
    )
    return Uneven(local, mesh, [Shard(axis)], {0: shapes})


def uneven(rank: int, world: int) -> None:
    """Shards of tokens, of the batch and of heads, and what is refused."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    arrays = [torch.randn(3, 7, 4, 4, 2, dtype=torch.float64) for _ in range(3)]
    more = torch.randn(3, 2, 4, 2, dtype=torch.float64)
    whole = [array.clone().requires_grad_() for array in arrays]
    given = {"kernel_size": (4, 2), "dilation": (1, 2), "return_lse": True}
    expected = cuneigh.na2d(*whole, **given, additional_keys=more, additional_values=more)
    expected[0].square().sum().backward()
    extra = DTensor.from_local(more, mesh, [Replicate()], run_check=False)
    for axis, sizes in ((0, (1, 2)), (1, (5, 2)), (1, (7, 0)), (3, (3, 1))):
        local = [cut(array, mesh, axis, sizes) for array in arrays]
        got = distributed.na2d(*local, **given, additional_keys=extra, additional_values=extra)
        got[0].local.square().sum().backward()
        start, size = sum(sizes[:rank]), sizes[rank]
        for one, reference in zip(got, expected, strict=True):
            close(one.local, reference.narrow(axis, start, size), (axis, sizes))
            assert one.shape == reference.shape
        for one, reference in zip(local, whole, strict=True):
            close(one.local.grad, reference.grad.narrow(axis, start, size), (axis, sizes))
            assert one.gradients == (Shard(axis),)
    query, key = (cut(arrays[0], mesh, 1, sizes) for sizes in ((5, 2), (4, 3)))
    message = raised(lambda: distributed.na2d(query, key, key, 3))
    words = "na2d: key has shards of [4, 3] along axis 0 of the mesh, but query has [5, 2]"
    assert message == f"ValueError: {words}", message
    repeated = Uneven(arrays[0], mesh, [Replicate()], {})
    distributed.na2d(query, repeated, repeated, 3)
    assert repeated.gradients == (Partial(),)
