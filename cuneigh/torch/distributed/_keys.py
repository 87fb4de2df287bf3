"""The keys and values that a rank's queries see, from wherever they come, and their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from cuneigh._problem import Operands
from cuneigh._shards.plan import Box
from cuneigh.torch.distributed._exchange import Exchange, Message, of_tokens, shape_with
from cuneigh.torch.distributed._task import Task


class Keys:
    """Keys, values and the mask of `plan.seen`: of all tokens that a rank's queries see.

    They are the rank's own arrays if it needs none of another rank.
    """

    def __init__(self, task: Task, operands: Operands) -> None:
        """Begin to send what other ranks need, and to receive what this one does."""
        own = [operands.key, operands.value]
        if operands.key_mask is not None:
            own.append(operands.key_mask)
        plan = task.plan
        self._task, self._arrays, self._exchange = task, own, None
        if plan.exchanges:
            sent = Message(task.sent, own)
            for box, places in sent.parts():
                for array, place in zip(own, places, strict=True):
                    place[...] = array[of_tokens(box, plan.own)]
            received = Message(task.received, own)
            self._exchange = Exchange(task.call, task.process_group, sent, received)
        if plan.receives:  # own ones are copied while the others are under way
            self._arrays = [one.new_empty(shape_with(plan.seen, one)) for one in own]
            self._put(plan.own, own)

    def _put(self, box: Box, arrays: Sequence[torch.Tensor]) -> None:
        where = of_tokens(box, self._task.plan.seen)
        for array, into in zip(arrays, self._arrays, strict=True):
            into[where] = array  # of a mask, any number but 0 becomes True

    def complete(self) -> None:
        """Wait for what other ranks send."""
        if self._exchange is None:
            return
        for box, arrays in self._exchange.wait().parts():
            self._put(box, arrays)
        self._exchange = None

    def among(self, operands: Operands) -> Operands:
        """`operands` with these keys, values and mask in place of the rank's own."""
        key, value, *mask = self._arrays
        return operands._replace(key=key, value=value, key_mask=mask[0] if mask else None)


class Part(NamedTuple):
    """The gradients of the keys and values of a box, from some of the queries."""

    box: Box
    arrays: Sequence[torch.Tensor]

    def cut(self, box: Box) -> Part:
        """What of it belongs to another box."""
        shared = self.box.meet(box)
        where = of_tokens(shared, self.box)
        return Part(shared, [array[where] for array in self.arrays])


class KeyGradients:
    """The gradients of keys and values: of the rank's own ones, and of those of other ranks."""

    def __init__(self, task: Task, seen: Operands) -> None:
        """`seen` has the keys and values of `plan.seen`."""
        self._task, self._seen = task, (seen.key, seen.value)
        self._parts: list[Part] = []
        self._exchange: Exchange | None = None

    def add(self, box: Box, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add those of the keys and values of a box that some of the queries see."""
        self._parts.append(Part(box, (key, value)))

    def send(self) -> None:
        """Begin to send those of other ranks' keys, and to receive those of the rank's own.

        What is added afterwards must belong to own keys.
        """
        task = self._task
        sent = Message(task.received, self._seen)
        for box, places in sent.parts():
            for array, place in zip(self._sum(box), places, strict=True):
                place[...] = array
        back = Message(task.sent, self._seen)
        self._exchange = Exchange(task.call, task.process_group, sent, back)

    def total(self) -> list[torch.Tensor]:
        """Those of the rank's own keys and values: of its own queries and those that came."""
        own = self._task.plan.own
        sums = [array.contiguous() for array in self._sum(own)]
        if self._exchange is not None:
            _add(self._exchange.wait().parts(), sums, own)
        return sums

    def _sum(self, box: Box) -> Sequence[torch.Tensor]:
        """Those of the tokens of a box, by the rank's own queries."""
        cuts = [part.cut(box) for part in self._parts]
        parts = sorted((cut for cut in cuts if cut.box.tokens), key=lambda cut: cut.box != box)
        if not parts or parts[0].box != box:
            sums = [one.new_zeros(shape_with(box, one)) for one in self._seen]
        elif len(parts) == 1:
            return parts[0].arrays
        else:
            sums = [one.clone(memory_format=torch.contiguous_format) for one in parts.pop(0).arrays]
        _add(parts, sums, box)
        return sums


def _add(
    parts: Iterable[tuple[Box, Sequence[torch.Tensor]]], sums: Sequence[torch.Tensor], box: Box
) -> None:
    """Add the arrays of other boxes to those of a box, in which these lie."""
    for of, arrays in parts:
        for total, array in zip(sums, arrays, strict=True):
            total[of_tokens(of, box)] += array
