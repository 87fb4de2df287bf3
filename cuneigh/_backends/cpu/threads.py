"""Running the boxes of a problem on several threads, with one BLAS thread each.

NumPy releases the interpreter while it computes, so that threads serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from threading import Condition
from typing import TypeVar

from cuneigh import _settings
from cuneigh._backends.cpu.helpers import Job
from cuneigh._device import HOST_THREADS

Item = TypeVar("Item")
Space = TypeVar("Space")
Result = TypeVar("Result")


def thread_count() -> int:
    """CUNEIGH_NUM_THREADS, else what the caller's framework takes, else as many as there may be.

    Those are OMP_NUM_THREADS, else the number of usable cores.
    """
    for given in (_settings.NUM_THREADS.read(), HOST_THREADS.get(), _settings.openmp_threads()):
        if given is not None:
            return given
    return _settings.usable_cores()


def in_order(
    compute: Callable[[Item, Space], Result],
    items: Iterable[Item],
    threads: int,
    workspace: Callable[[], AbstractContextManager[Space]],
    collect: Callable[[Result], None] | None,
) -> None:
    """``compute(item, space)`` for all items, on so many threads at most.

    Each thread has a space of its own. `collect` is called with every result, by one thread at a
    time and in the order of the items, before the space in which the result was made is used again.
    """
    if isinstance(items, list):
        threads = min(threads, len(items))
    source = enumerate(items)
    changed = Condition()
    collected = 0

    def work(job: Job) -> None:
        try:
            with workspace() as space:
                while not job.stopped:
                    with changed:
                        turn, item = next(source, (-1, None))
                    if item is None:
                        break
                    result = compute(item, space)
                    if collect is not None:
                        collect_in_turn(job, turn, result)
        except BaseException:
            job.stopped = True
            raise
        finally:
            with changed:
                changed.notify_all()

    def collect_in_turn(job: Job, turn: int, result: Result) -> None:
        nonlocal collected
        with changed:
            changed.wait_for(lambda: job.stopped or collected == turn)
        if collect is not None and not job.stopped:
            collect(result)
            with changed:
                collected += 1
                changed.notify_all()

    Job(work, threads).run()
