"""Running the boxes of a problem on several threads, with one BLAS thread each.

NumPy releases the interpreter while it computes, so that threads serve. The BLAS threads are
taken away meanwhile: two levels of threads would fight for the cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from cuneigh._device import HOST_THREADS

Item = TypeVar("Item")
Space = TypeVar("Space")
Result = TypeVar("Result")


def thread_count() -> int:
    """CUNEIGH_NUM_THREADS, else what the caller's framework takes, else as many as there may be.

    Those are OMP_NUM_THREADS, else the number of usable cores.
    """
    for name in ("CUNEIGH_NUM_THREADS", "OMP_NUM_THREADS"):
        try:
            return max(int(os.environ[name]), 1)
        except (KeyError, ValueError):
            pass
        if (threads := HOST_THREADS.get()) is not None:
            return threads
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cuneigh")


class _OneBlasThread:
    """A context in which NumPy's BLAS uses the calling thread alone.

    The limit belongs to the whole process, so the first to enter sets it and the last to leave
    takes it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._controller: Any = None
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                if self._controller is None:
                    self._controller = ThreadpoolController().select(user_api="blas")
                self._limits = self._controller.limit(limits=1)
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._limits.restore_original_limits()

    def forget(self) -> None:
        """Leave on behalf of threads that no longer exist."""
        if self._inside:
            self._limits.restore_original_limits()
        self._lock, self._inside = threading.Lock(), 0


_one_blas_thread = _OneBlasThread()


def _after_fork() -> None:
    _pool.cache_clear()
    _one_blas_thread.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def in_order(
    compute: Callable[[Item, Space], Result],
    items: Iterable[Item],
    workspace: Callable[[], AbstractContextManager[Space]],
    collect: Callable[[Result], None] | None,
) -> None:
    """``compute(item, space)`` for all items, on several threads, the calling one among them.

    Each thread has a space of its own. `collect` is called with every result, by one thread at a
    time and in the order of the items, before the space in which the result was made is used again.
    """
    threads = thread_count()
    if isinstance(items, list):
        threads = min(threads, len(items))
    source = enumerate(items)
    changed = threading.Condition()
    collected, failed = 0, False

    def work() -> None:
        nonlocal failed
        try:
            with workspace() as space:
                while not failed:
                    with changed:
                        turn, item = next(source, (-1, None))
                    if item is None:
                        break
                    result = compute(item, space)
                    if collect is not None:
                        collect_in_turn(turn, result)
        except BaseException:
            with changed:
                failed = True
                changed.notify_all()
            raise

    def collect_in_turn(turn: int, result: Result) -> None:
        nonlocal collected
        with changed:
            changed.wait_for(lambda: failed or collected == turn)
        if collect is not None and not failed:
            collect(result)
            with changed:
                collected += 1
                changed.notify_all()

    with _one_blas_thread:
        helpers = [_pool(threads - 1).submit(work) for _ in range(threads - 1)]
        try:
            work()
        finally:  # nobody may write to the caller's arrays any more
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()
