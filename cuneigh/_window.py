"""Which keys a query sees along one token axis, and which queries see a key.

1. Token ``x`` belongs to dilation group ``x % dilation`` and has index ``x // dilation`` in it.
   Attention never crosses groups; everything below is in group indices.
2. `stride` consecutive queries share one window, that of their leader: the middle one of them, or
   the last one on a causal axis, in either case at most the last query of the group.
3. The window of a leader holds `kernel_size` keys around it and is pushed inwards at the borders;
   an even window has one key more on the left than on the right. On a causal axis it ends with the
   query itself and may be cut short by the left border.
4. A query sees a key when all of that holds on every axis.

The contract: what `Axis.window(i, group)` and `Axis.inverse(j, group)` promise of their (begin,
end), for every group and every i and j in it. `Promise` names its parts. A backend says in its
`RELIES_ON` which of them it relies on, and must refuse windows that break one of those.

- `ONE_RANGE`: what is seen is the one range begin <= index < end; it may be empty.
- `INSIDE`: the range lies inside the group: 0 <= begin <= end <= length of the group.
- `INCREASING`: neither begin nor end ever decreases from one index to the next. So the union of the
  ranges of consecutive indices i .. j reaches from begin(i) to end(j), and what is common to all of
  them is begin(j) .. end(i), if that is not empty. (An empty range, of a key that no query sees, is
  placed so that this holds.)

The arithmetic works alike on ints and on NumPy integer arrays. Its twin in C++ is
`cuda/cuneigh/window.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Index = TypeVar("Index", int, npt.NDArray[np.int64])


class Promise(Flag):
    """The parts of the contract that the docstring of this module states."""

    ONE_RANGE = auto()
    INSIDE = auto()
    INCREASING = auto()


CONTRACT = Promise.ONE_RANGE | Promise.INSIDE | Promise.INCREASING
"""What every window keeps today."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One token axis: its lengths and the window that slides along it.

    `key_length` differs from `length` only in cross attention, where every query sees every key
    (`kernel_size == key_length`).
    """

    length: int
    key_length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    def group_length(self, group: Index) -> Index:
        """Number of queries in dilation group `group`."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def key_group_length(self, group: Index) -> Index:
        """Number of keys in dilation group `group`."""
        return (self.key_length - group + self.dilation - 1) // self.dilation

    def window(self, index: Index, group: Index) -> tuple[Index, Index]:
        """Half-open range of key indices that query `index` of `group` sees."""
        last = self.group_length(group) - 1
        offset = self.stride - 1 if self.is_causal else self.stride // 2
        leader = minimum(index // self.stride * self.stride + offset, last)
        if self.is_causal:
            return maximum(leader - self.kernel_size + 1, 0), index + 1
        latest = self.key_group_length(group) - self.kernel_size
        start = minimum(maximum(leader - self.kernel_size // 2, 0), latest)
        return start, start + self.kernel_size

    def inverse(self, index: Index, group: Index) -> tuple[Index, Index]:
        """Half-open range of query indices that see key `index` of `group`."""
        k, s = self.kernel_size, self.stride
        length = self.group_length(group)
        if self.is_causal:
            past_end = index + k >= length
            return index, minimum(s * ((index + k) // s + past_end), length)
        right = k - 1 - k // 2
        begin = s * ((index - right + s - s // 2 - 1) // s)
        begin = where(index >= k, begin, 0)
        end = s * ((index + k // 2 + s - s // 2) // s)
        end = where(index >= self.key_group_length(group) - k, length, end)
        return minimum(maximum(begin, 0), length), minimum(maximum(end, 0), length)

    def windows(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`window` of every token of the axis, in token order."""
        token = np.arange(self.length, dtype=np.int64)
        return self.window(token // self.dilation, token % self.dilation)

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs along this axis in which the query sees the key."""
        start, end = self.windows()
        return int((end - start).sum())


def minimum(a: Index, b: Index | int) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else np.minimum(a, b)


def maximum(a: Index, b: Index | int) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else np.maximum(a, b)


def where(condition: object, a: Index | int, b: Index | int) -> Index:
    if isinstance(condition, bool):
        return a if condition else b  # type: ignore[return-value]
    return np.where(condition, a, b)  # type: ignore[call-overload,no-any-return]
