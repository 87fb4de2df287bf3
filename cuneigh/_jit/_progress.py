"""What is told on standard error of kernels being compiled; `CUNEIGH_QUIET=1` silences it."""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from cuneigh._jit._cache import default_directory
from cuneigh._jit._sources import Kernel
from cuneigh._settings import QUIET

Result = TypeVar("Result")

PATIENCE = 2.0
"""Seconds after which a terminal gets a progress bar."""


def is_quiet() -> bool:
    """Whether the user wants to read nothing of it: CUNEIGH_QUIET=1."""
    return bool(QUIET.read())


def tell(kernels: Sequence[Kernel], arch: str) -> None:
    """Say which kernels are being compiled."""
    if is_quiet() or sys.stderr is None:
        return
    counts = {kernel.name: 0 for kernel in kernels}
    for kernel in kernels:
        counts[kernel.name] += 1
    names = ", ".join(f"{name} ({n})" if n > 1 else name for name, n in counts.items())
    print(
        f"cuneigh: compiling {names} for {arch}, once: kernels are kept in {default_directory()}",
        file=sys.stderr,
        flush=True,
    )


def wait(future: Future[Result], all_of_them: Collection[Future[Result]]) -> Result:
    """The result of `future`; a terminal gets a progress bar of all if that takes long."""
    futures = list(all_of_them)
    done, _ = concurrent.futures.wait([future], PATIENCE)
    progress = None if done else _bar()
    if progress is not None:
        with progress:
            task = progress.add_task("cuneigh: compiling", total=len(futures))
            while not future.done():
                progress.update(task, completed=sum(each.done() for each in futures))
                concurrent.futures.wait([future], 0.1)
    return future.result()


def _bar() -> Any:
    """A progress bar of rich; None where there is no terminal, no rich, or no wish to see it."""
    if is_quiet() or sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import (
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        return None
    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn()
    console = Console(stderr=True)
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
