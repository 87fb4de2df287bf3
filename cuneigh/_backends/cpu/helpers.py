"""Threads that compute for all callers, and wait for work in between.

A caller only waits. Whatever interrupts it (Ctrl-C does so between any two instructions), what the
threads share stays as they need it: a caller holds nothing but locks of the interpreter itself,
which a `with` statement gives back in any case. Python's end does not wait for the threads.
"""

from __future__ import annotations

import os
import sys
from _thread import start_new_thread
from collections.abc import Callable
from queue import SimpleQueue
from threading import Lock

from cuneigh._backends.cpu.blas import one_thread


class Job:
    """Work in which several threads take part.

    Each of them calls ``work(job)``, which returns when nothing is left to begin, and soon after
    `stopped` is set.
    """

    def __init__(self, work: Callable[[Job], None], threads: int) -> None:
        self.threads = threads
        self.stopped = False
        self._work: Callable[[Job], None] | None = work
        self._error: BaseException | None = None
        self._inside = 0
        self._lock = Lock()
        self._unfinished = Lock()
        self._unfinished.acquire()

    def run(self) -> None:
        """Have the work done by helpers; by the calling thread where there are none."""
        alone = False
        try:
            alone = not _helpers.join(self)
            if alone:
                self.take_part()
            else:
                self._wait()
        except BaseException:
            self.stopped = True
            self._finish()
            if not alone:
                self._wait()  # nobody may write to the caller's arrays any more
            raise
        if self._error is not None:
            raise self._error

    def take_part(self) -> None:
        """Do what is left to do."""
        with self._lock:
            work = self._work
            if work is None or self.stopped:
                return
            self._inside += 1
        try:
            with one_thread():
                work(self)
        except BaseException as error:
            self._error, self.stopped = error, True
        finally:
            with self._lock:
                self._inside -= 1
            self._finish()

    def _finish(self) -> None:
        """Let the caller go if no thread takes part any more."""
        with self._lock:
            if self._inside == 0 and self._work is not None:
                self._work = None  # and its arrays: a helper may come to this job much later
                _helpers.forget(self)
                self._unfinished.release()

    def _wait(self) -> None:
        with self._unfinished:
            pass


class _Helpers:
    """The threads, as many as the unfinished jobs want together."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Job] = SimpleQueue()
        self._unfinished: set[Job] = set()
        self._started = 0

    def join(self, job: Job) -> bool:
        """Have threads take part in `job`; False if there is none, nor can one be started."""
        if sys.is_finalizing():  # no other thread runs any more
            return False
        self._unfinished.add(job)
        wanted = sum(each.threads for each in list(self._unfinished))
        try:
            while self._started < wanted:
                # Not `threading.Thread`, whose `start` waits under locks of its own.
                start_new_thread(self._serve, ())
                self._started += 1
        except RuntimeError:  # the system gives no more, or Python has begun to end
            pass
        if self._started == 0:
            self.forget(job)
            return False
        for _ in range(job.threads):
            self._queue.put(job)
        return True

    def forget(self, job: Job) -> None:
        self._unfinished.discard(job)

    def _serve(self) -> None:
        while True:
            self._queue.get().take_part()


_helpers = _Helpers()


def _after_fork() -> None:
    """The threads are not there in the new process."""
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
