"""Threads that compile for all callers, who only wait.

Whatever interrupts a caller (Ctrl-C does so between any two instructions), what the threads share
stays as they need it: a caller holds nothing but locks of the interpreter itself, which a `with`
statement gives back in any case. `concurrent.futures` has others, which may stay taken for ever.
"""

from __future__ import annotations

import atexit
from _thread import start_new_thread
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from threading import Lock
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_unfinished: set[Task[Any]] = set()


class Task(Generic[Result]):
    """Something that a thread computes."""

    def __init__(self, compute: Callable[[], Result]) -> None:
        self.is_done = False
        self._compute = compute
        self._result: Result
        self._error: BaseException | None = None
        self._claim = Lock()
        """Whoever gets it decides whether the task runs."""
        self._running = Lock()
        self._running.acquire()
        _unfinished.add(self)

    def run(self) -> None:
        """Compute it, unless it was dropped."""
        if not self._claim.acquire(blocking=False):
            return
        try:
            self._result = self._compute()
        except BaseException as error:
            self._error = error
        finally:
            self.is_done = True
            _unfinished.discard(self)
            self._running.release()

    def result(self) -> Result:
        """Wait for what it computes; an error of the computation is raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def drop(self) -> bool:
        """Have it not run; False if it has begun."""
        dropped = self._claim.acquire(blocking=False)
        if dropped:
            _unfinished.discard(self)
        return dropped

    def wait(self) -> None:
        """Wait for its end."""
        with self._running:
            pass


class Threads:
    """Threads that do tasks in their order, `most` at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._started = 0
        self._queue: SimpleQueue[Task[Any] | None] = SimpleQueue()

    def submit(self, compute: Callable[[], Result]) -> Task[Result]:
        """Have a thread compute it; RuntimeError where there is none, nor can one be started."""
        task = Task(compute)
        if self._started < self._most:
            try:
                # Not `threading.Thread`, whose `start` waits under locks of its own.
                start_new_thread(self._serve, ())
                self._started += 1
            except RuntimeError:  # the system gives no more, or Python has begun to end
                if self._started == 0:
                    task.drop()
                    raise
        self._queue.put(task)
        return task

    def end(self) -> None:
        """Have the threads end when no task is left."""
        for _ in range(self._started):
            self._queue.put(None)

    def _serve(self) -> None:
        while (task := self._queue.get()) is not None:
            task.run()
            del task  # and what it computes, while the thread waits


def drop(tasks: Iterable[Task[Any]]) -> None:
    """Drop what has not begun, and wait for the rest."""
    for task in [task for task in tasks if not task.drop()]:
        task.wait()


@atexit.register
def drop_all() -> None:
    """NVRTC crashes where the end of the process takes it down while it compiles."""
    drop(list(_unfinished))
