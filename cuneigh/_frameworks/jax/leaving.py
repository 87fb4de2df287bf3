"""The end of a process in which XLA still has calls to make.

Programs over several devices are computed while Python goes on. A call needs Python: once that has
ended, XLA would wait for the call, and the process for XLA, without end.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

QUIET = 0.05
"""Seconds without a call after which none is expected any more."""

_under_way: set[int] = set()
_latest = 0.0
"""When the latest call ended."""


@contextmanager
def call_under_way(number: int) -> Iterator[None]:
    """While a call is served; calls at the same time have different numbers."""
    global _latest
    _under_way.add(number)
    try:
        yield
    finally:
        _under_way.discard(number)
        _latest = time.monotonic()


@atexit.register  # after JAX has registered its own, which therefore comes later
def wait_for_calls() -> None:
    """Wait for results that somebody holds, and then for those that nobody does."""
    for array in jax.live_arrays():
        with suppress(Exception):  # what has failed, or was given away
            array.block_until_ready()
    while _under_way or time.monotonic() - _latest < QUIET:
        time.sleep(QUIET / 5)
