"""Running the boxes of a problem on several threads, with one BLAS thread each.

NumPy releases the interpreter while it computes, so that threads serve. The BLAS threads are
taken away meanwhile: two levels of threads would fight for the cores.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Space = TypeVar("Space")
Result = TypeVar("Result")


def thread_count() -> int:
    """CUNEIGH_NUM_THREADS, else OMP_NUM_THREADS, else the number of usable cores."""
    for name in ("CUNEIGH_NUM_THREADS", "OMP_NUM_THREADS"):
        try:
            return max(int(os.environ[name]), 1)
        except (KeyError, ValueError):
            pass
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
    function: Callable[[Item, Space], Result],
    items: Iterable[Item],
    workspace: Callable[[], Space],
    collect: Callable[[Result], None],
) -> None:
    """``collect(function(item, space))`` for all items, in their order.

    As many calls of `function` run at the same time as there are threads, each with a space of its
    own. A space is used again once the result that was made in it is collected.
    """
    threads = thread_count()
    if threads == 1 or (isinstance(items, list) and len(items) == 1):
        space = workspace()
        with _one_blas_thread:
            for item in items:
                collect(_quietly(function, item, space))
        return
    pool = _pool(threads)
    running: deque[tuple[Future[Result], Space]] = deque()
    with _one_blas_thread:
        try:
            for item in items:
                if len(running) <= threads:
                    space = workspace()
                else:
                    future, space = running.popleft()
                    collect(future.result())
                running.append((pool.submit(_quietly, function, item, space), space))
            while running:
                collect(running.popleft()[0].result())
        finally:  # after an error, outlive the calls that write to the caller's arrays
            wait([future for future, _ in running if not future.cancel()])


def _quietly(function: Callable[..., Result], *arguments: object) -> Result:
    """Infinities and NaN are legal in the inputs, and masked where they arise from hidden keys."""
    with np.errstate(all="ignore"):
        return function(*arguments)
