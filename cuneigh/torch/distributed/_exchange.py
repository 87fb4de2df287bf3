"""One all-to-all that brings keys, values and masks from other ranks, or their gradients back.

A message is one run of numbers for each pair of ranks: box after box of the plan, and of each box
what belongs to the keys, to the values and to the mask. All of it has the dtype of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from cuneigh._shards.plan import Box, Boxes
from cuneigh.torch.distributed._agreement import agreement_of


def of_tokens(box: Box, origin: Box) -> tuple[slice, ...]:
    """The index of a box into an array ``[batch, tokens of origin.., and the rest]``."""
    return (slice(None), *box.slices(origin))


def shape_with(box: Box, array: torch.Tensor) -> tuple[int, ...]:
    """The shape of `array`, whose token axes are those after the first, with other tokens."""
    return (array.shape[0], *box.shape, *array.shape[1 + len(box.shape) :])


class Message:
    """Numbers for, or from, all ranks of a group, and where they belong."""

    def __init__(self, messages: Sequence[Boxes], arrays: Sequence[torch.Tensor]) -> None:
        """`messages` has the boxes for every rank, of arrays like `arrays` but for the tokens."""
        self._boxes = [box for boxes in messages for box in boxes]
        self._arrays = arrays
        self.splits = [
            sum(math.prod(shape_with(box, one)) for box in boxes for one in arrays)
            for boxes in messages
        ]
        self.numbers = arrays[0].new_empty(sum(self.splits))

    def parts(self) -> Iterator[tuple[Box, list[torch.Tensor]]]:
        """Every box, and the numbers in it that belong to each array."""
        at = 0
        for box in self._boxes:
            places = []
            for array in self._arrays:
                shape = shape_with(box, array)
                end = at + math.prod(shape)
                places.append(self.numbers[at:end].view(shape))
                at = end
            yield box, places


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
