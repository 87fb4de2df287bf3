"""What the ranks of `helpers.ranks` run of calls that fail: on all ranks, and not without end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from helpers import rank_suites
from torch.distributed.device_mesh import DeviceMesh

from cuneigh.torch import distributed
from cuneigh.torch.distributed import _agreement


def errors(rank: int, world: int) -> None:
    """Every rank raises, and is told which rank and argument it was; nobody waits for ever."""
    _agreement.PATIENCE = 0.5
    # What NCCL waits for too long, its own watchdog ends the process for.
    is_gloo = rank_suites.DEVICE == "cpu"
    group = dist.new_group(timeout=timedelta(seconds=1.5 if is_gloo else 60))
    mesh = DeviceMesh.from_group(group, rank_suites.DEVICE, mesh_dim_names=("x",))
    sharding = distributed.Sharding(mesh, ("x",), layout=(4 * world,))
    last = world - 1
    for axes, given, expected in [
        (("y",), {}, "ValueError: Sharding: mesh_axes[0]='y' is not an axis of the mesh"),
        (
            ("x", "x"),
            {},
            "ValueError: Sharding: mesh_axes=('x', 'x') has an axis of the mesh twice",
        ),
        ("x", {}, "TypeError: Sharding: mesh_axes='x' is str"),
        (("x",), {"layout": (-1,)}, "ValueError: Sharding: layout[0]=-1 must not be negative"),
        (("x",), {"layout": (1, 1)}, "ValueError: Sharding: layout=(1, 1) has 2 entries, but mesh"),
        (("x",), {"sizes": ((1,) * 9,)}, "ValueError: Sharding: sizes[0]=(1, 1, 1, 1, 1, 1, 1, 1,"),
        (
            ("x",),
            {"sizes": (4,)},
            "TypeError: Sharding: sizes[0]=4 is int; a tuple with the tokens",
        ),
        (("x",), {"layout": (1,), "sizes": ((1,),)}, "ValueError: Sharding: layout and sizes were"),
    ]:
        message = rank_suites.raised(
            lambda axes=axes, given=given: distributed.Sharding(mesh, axes, **given)
        )
        assert message.startswith(expected), message

    def attend(mine: Any = torch.float32, size: int = 4, batch: int = 1, **parameters: Any) -> Any:
        """A call in which the last rank is another one; the others have what is usual."""
        is_last = rank == last
        dtype = mine if is_last else torch.float32
        shape = (batch if is_last else 1, size if is_last else 4, 2, 4)
        ones = torch.ones(shape, dtype=dtype, device=rank_suites.DEVICE, requires_grad=True)
        given = {"kernel_size": 3, **(parameters if is_last else {})}
        return distributed.na1d(ones, ones, ones, **given, sharding=sharding)

    for wrong, own in [
        ({"mine": torch.complex64}, "TypeError: na1d: query has dtype complex64"),
        ({"size": 5}, f"ValueError: na1d: query has size 5 on axis 1, but shard {last}"),
        ({"kernel_size": 99}, "ValueError: na1d: kernel_size=99 times dilation=1 on axis 0"),
    ]:
        message = rank_suites.raised(lambda wrong=wrong: attend(**wrong))
        expected = own if rank == last else f"RuntimeError: na1d: rank {last} failed with {own}"
        assert message.startswith(expected), message
    for wrong, expected in [
        ({"kernel_size": 2}, f"kernel_size: rank 0 has [3], rank {last} has [2]"),
        ({"border": "cut"}, f"border: rank 0 has ['shift'], rank {last} has ['cut']"),
        ({"batch": 2}, "query: rank 0 has 'torch.float32 [1, tokens, 2, 4]'"),
        ({"mine": torch.float64}, "query: rank 0 has 'torch.float32"),
    ]:
        message = rank_suites.raised(lambda wrong=wrong: attend(**wrong))
        assert message.startswith(f"ValueError: na1d: ranks differ in {expected}"), message
    attend().sum().backward()  # the group is as good as ever
    for parameters, expected in [
        ({}, f"waited for rank {last}; no call can use it any more ("),
        ({}, f"failed before: rank {rank} exchanged keys and values in process group "),
    ]:
        if rank != last and is_gloo:
            message = rank_suites.raised(lambda parameters=parameters: attend(**parameters))
            assert expected in message, message
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=1.5))
    mesh = DeviceMesh.from_group(group, rank_suites.DEVICE, mesh_dim_names=("x",))
    sharding = distributed.Sharding(mesh, ("x",), layout=(4 * world,))
    lost_store(group, last)
    if rank != last:
        message = rank_suites.raised(attend)
        assert f"rank {last} did not make this call within the 1.5 s" in message, message
    dist.barrier()


def lost_store(group: Any, last: int) -> None:
    """The process that holds the store of the groups has died, and with it what can be asked."""

    class Lost:
        def __getattr__(self, name: str) -> Any:
            raise dist.DistNetworkError("Broken pipe")

    agreement = _agreement.Agreement(group)
    agreement._store = Lost()

    def exchange() -> None:
        with agreement.waiting("na1d", [last]):
            raise RuntimeError("Connection closed by peer")

    def agree() -> None:
        agreement.require("na1d", {}, torch.device("cpu"))

    for call, expected in [
        (exchange, f"waited for rank {last}; the process that holds the store of the process"),
        (agree, "failed before: rank"),
    ]:
        assert expected in rank_suites.raised(call), rank_suites.raised(call)
    agreement._end = None
    assert "na1d: the process that holds the store" in rank_suites.raised(agree)
    agreement.refuse(ValueError("of its own"))  # which is what the caller is to see
