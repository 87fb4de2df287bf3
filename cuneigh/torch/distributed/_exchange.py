"""One all-to-all that brings keys, values and masks from other ranks, or their gradients back.

A message is one run of numbers for each pair of ranks: box after box of the plan, and of each box
what belongs to the keys, to the values and to the mask. All of it has the dtype of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from cuneigh._shards.plan import Box, Boxes
from cuneigh.torch.distributed._agreement import agreement_of


class Format(NamedTuple):
    """What belongs to each token: the axes of every array but those of the tokens."""

    batch: int
    rests: tuple[tuple[int, ...], ...]
    """The axes after those of the tokens."""

    @property
    def each(self) -> int:
        """Numbers for one token."""
        return self.batch * sum(map(math.prod, self.rests))


def format_of(arrays: Sequence[torch.Tensor], rank: int) -> Format:
    """That of arrays with `rank` token axes."""
    rests = tuple(tuple(array.shape[1 + rank :]) for array in arrays)
    return Format(arrays[0].shape[0], rests)


def tokens_in(messages: Sequence[Boxes]) -> int:
    return sum(box.tokens for boxes in messages for box in boxes)


class Message:
    """Numbers for, or from, all ranks of a group, and where they belong."""

    def __init__(self, messages: Sequence[Boxes], form: Format, numbers: torch.Tensor) -> None:
        """`messages` has the boxes for every rank of the group."""
        self._boxes = [box for boxes in messages for box in boxes]
        self._form = form
        self.numbers = numbers
        self.splits = [form.each * sum(box.tokens for box in boxes) for boxes in messages]

    def parts(self) -> Iterator[tuple[Box, list[torch.Tensor]]]:
        """Every box, and the numbers in it that belong to each array."""
        at = 0
        for box in self._boxes:
            arrays = []
            for rest in self._form.rests:
                shape = (self._form.batch, *box.shape, *rest)
                size = math.prod(shape)
                arrays.append(self.numbers[at : at + size].view(shape))
                at += size
            yield box, arrays

    def fill(self, arrays: Sequence[torch.Tensor], origin: Box) -> None:
        """Put in the numbers of `arrays`, which have the tokens of `origin`."""
        for box, places in self.parts():
            for array, place in zip(arrays, places, strict=True):
                place.copy_(array[of_tokens(box, origin)])


def of_tokens(box: Box, origin: Box) -> tuple[slice, ...]:
    """The index of a box into an array ``[batch, tokens of origin.., and the rest]``."""
    return (slice(None), *box.slices(origin))


class Exchange:
    """An all-to-all, under way from the time it is made until `wait` returns."""

    def __init__(
        self, call: str, group: dist.ProcessGroup, sent: Message, received: Message
    ) -> None:
        """`call` is the name of the public function."""
        self._call, self._agreement = call, agreement_of(group)
        # On the side of NCCL it is under way until `wait`, so nothing of it may be freed before
        self._sent, self._received = sent, received
        splits = zip(self._agreement.ranks, sent.splits, received.splits, strict=True)
        self._peers = [rank for rank, *sizes in splits if any(sizes)]
        with self._agreement.waiting(call, self._peers):
            self._work = dist.all_to_all_single(
                received.numbers,
                sent.numbers,
                received.splits,
                sent.splits,
                group=group,
                async_op=True,
            )

    def wait(self) -> Message:
        """What came. On a GPU the current stream waits for it, and not the caller."""
        with self._agreement.waiting(self._call, self._peers):
            self._work.wait()
        return self._received
