"""A call on one rank apart from its arrays, and the plan that follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from cuneigh._problem import Operands
from cuneigh._shards.axis import Shards
from cuneigh._shards.plan import Boxes, Plan, Work, plan_of
from cuneigh._window import Axis

WORTH_SPLITTING = 10**13
"""Floating-point operations of the queries that need no message from which on they are computed by
calls of their own. On two H200, over NVLink, that took 5 % longer at 2 * 10^12, since calls for the
few other queries are slow, and no longer at 10^13; a slower network has more to hide."""


@dataclass(frozen=True)
class Task:
    """A call apart from its arrays, on one rank. As text it can stand in a compiled program."""

    call: str
    """The name of the public function."""
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: tuple[str, ...]
    scale: float
    backend: str | None
    group: str
    """The name of the process group; empty for a layout that is whole."""
    order: tuple[int, ...]
    """The rank in the group of every rank of the plan."""
    place: int
    """This rank in the plan."""
    sizes: tuple[tuple[int, ...], ...]
    """Of all shards along every token axis."""

    def encoded(self) -> str:
        return json.dumps([getattr(self, field.name) for field in fields(self)])

    @cached_property
    def rank(self) -> int:
        return len(self.sizes)

    @cached_property
    def layout(self) -> tuple[int, ...]:
        return tuple(map(sum, self.sizes))

    @cached_property
    def plan(self) -> Plan:
        window = zip(
            *(self.layout, self.layout, self.kernel_size, self.stride, self.dilation),
            *(self.is_causal, self.border),
            strict=True,
        )
        axes = tuple(
            Shards(Axis(*of_axis), sizes) for of_axis, sizes in zip(window, self.sizes, strict=True)
        )
        return plan_of(axes, self.place)

    @property
    def process_group(self) -> dist.ProcessGroup:
        return _resolve_process_group(self.group)

    def by_rank(self, messages: Sequence[Boxes]) -> list[Boxes]:
        """The messages of the plan in the order of the group."""
        found: list[Boxes] = [()] * len(messages)
        for rank, boxes in zip(self.order, messages, strict=True):
            found[rank] = boxes
        return found

    @cached_property
    def sent(self) -> list[Boxes]:
        return self.by_rank(self.plan.sent)

    @cached_property
    def received(self) -> list[Boxes]:
        return self.by_rank(self.plan.received)

    def works(self, operands: Operands) -> tuple[Work, ...]:
        """The calls by which the queries are computed: those without a message come first."""
        pieces = self.plan.pieces
        if len(pieces) < 2:
            return pieces
        batch, *_, heads, head_dim = operands.query.shape
        dims = head_dim + operands.value.shape[-1]
        pairs = batch * heads * pieces[0].queries.tokens * math.prod(self.kernel_size)
        return pieces if 2 * pairs * dims >= WORTH_SPLITTING else self.plan.whole

    def terms(self, operands: Operands) -> dict[str, Any]:
        """What must be the same on all ranks: everything but the numbers of tokens."""
        of_arrays: dict[str, Any] = {}
        for name, array in operands._asdict().items():
            if array is None:
                of_arrays[name] = None
                continue
            shape = list(map(str, array.shape))
            if name in ("query", "key", "value", "key_mask"):
                shape[1 : 1 + self.rank] = ["tokens"] * self.rank
            of_arrays[name] = f"{array.dtype} [{', '.join(shape)}]"
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("call", "group", "order", "place"):
            del said[name]
        return {**of_arrays, "device": operands.query.device.type, **said}

    def parameters(self, work: Work) -> dict[str, Any]:
        """The arguments of a call for `work` that are not arrays."""
        starts = [tuple(one.start for one in box.ranges) for box in work]
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "backend": self.backend,
            "border": self.border,
            "layout": self.layout,
            "query_start": starts[0],
            "key_start": starts[1],
        }


@lru_cache(maxsize=4096)
def task_of(text: str) -> Task:
    return Task(*map(_tuples, json.loads(text)))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
