"""The keys and values that a rank's queries see, from wherever they come, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cuneigh._problem import Operands
from cuneigh._shards.plan import Box
from cuneigh.torch.distributed._exchange import (
    Exchange,
    Message,
    format_of,
    of_tokens,
    tokens_in,
)
from cuneigh.torch.distributed._task import Task


class Keys:
    """Keys, values and the mask of a rank, and those that other ranks send it."""

    def __init__(self, task: Task, operands: Operands, received: torch.Tensor | None = None):
        """`received` has the numbers of an earlier exchange, if there was one."""
        key, value, mask = operands.key, operands.value, operands.key_mask
        self._task, self._given = task, (key, value, mask)
        self._own = [key, value] if mask is None else [key, value, mask.to(key.dtype)]
        self._form = format_of(self._own, task.rank)
        if received is None:
            received = key.new_empty(self._form.each * tokens_in(task.received))
        self.received = Message(task.received, self._form, received)

    def send(self) -> Exchange:
        """Begin to send what other ranks need, and to receive what this one does."""
        task = self._task
        numbers = self._own[0].new_empty(self._form.each * tokens_in(task.sent))
        sent = Message(task.sent, self._form, numbers)
        sent.fill(self._own, task.plan.own)
        return Exchange(task.call, task.process_group, sent, self.received)

    def of(self, box: Box) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Key, value and mask of the tokens of a box."""
        own = self._task.plan.own
        if box.within(own):
            where = of_tokens(box, own)
            key, value, mask = (None if one is None else one[where] for one in self._given)
            return key, value, mask
        batch, rests = self._form
        made = [self._own[0].new_empty((batch, *box.shape, *rest)) for rest in rests]
        for source, arrays in ((own, self._own), *self.received.parts()):
            shared = source.meet(box)
            for array, into in zip(arrays, made, strict=True):
                into[of_tokens(shared, box)] = array[of_tokens(shared, source)]
        key, value, *masks = made
        return key, value, masks[0] != 0 if masks else None


class Part(NamedTuple):
    """The gradients of some of a rank's own keys and values, from some of the queries."""

    box: Box
    arrays: Sequence[torch.Tensor]


class KeyGradients:
    """The gradients of keys and values: of the rank's own ones, and of those of other ranks."""

    def __init__(self, task: Task, operands: Operands) -> None:
        self._task, self._given = task, (operands.key, operands.value)
        self._form = format_of(self._given, task.rank)
        numbers = operands.key.new_zeros(self._form.each * tokens_in(task.received))
        self._for_others = Message(task.received, self._form, numbers)
        self._own: list[Part] = []

    def add(self, box: Box, arrays: Sequence[torch.Tensor]) -> None:
        """Add those of the keys and values of a box that some of the queries see."""
        for source, places in self._for_others.parts():
            shared = source.meet(box)
            for array, place in zip(arrays, places, strict=True):
                place[of_tokens(shared, source)] += array[of_tokens(shared, box)]
        own = self._task.plan.own.meet(box)
        self._own.append(Part(own, [array[of_tokens(own, box)] for array in arrays]))

    def send(self) -> Exchange:
        """Begin to send those of other ranks' keys, and to receive those of the rank's own."""
        task = self._task
        numbers = self._given[0].new_empty(self._form.each * tokens_in(task.sent))
        back = Message(task.sent, self._form, numbers)
        return Exchange(task.call, task.process_group, self._for_others, back)

    def total(self, came: Message | None) -> list[torch.Tensor]:
        """Those of the rank's own keys and values: of its own queries and those that came."""
        own = self._task.plan.own
        parts = sorted(self._own, key=lambda part: part.box != own)
        if parts and parts[0].box == own:
            sums = [array.contiguous() for array in parts.pop(0).arrays]
        else:
            sums = [
                torch.zeros_like(one, memory_format=torch.contiguous_format) for one in self._given
            ]
        for box, arrays in (*parts, *(came.parts() if came else ())):
            for total, array in zip(sums, arrays, strict=True):
                total[of_tokens(box, own)] += array
        return sums
