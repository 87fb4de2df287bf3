"""What is told on standard error of kernels being compiled; `CUNEIGH_QUIET=1` silences it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from cuneigh._jit._cache import default_directory
from cuneigh._jit._sources import Kernel
from cuneigh._jit._threads import Task
from cuneigh._settings import QUIET

Result = TypeVar("Result")

PATIENCE = 2.0
"""Seconds after which a terminal gets a progress bar."""
POLL = 0.05
"""Seconds between looks at what is compiled, where a bar shows it."""


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


def wait(task: Task[Result], all_of_them: Sequence[Task[Any]]) -> Result:
    """The result of `task`; a terminal gets a progress bar of all if that takes long."""
    bar = None if task.is_done else _bar()
    if bar is not None:
        _show(bar, task, all_of_them)
    return task.result()


def _show(bar: Any, task: Task[Any], all_of_them: Sequence[Task[Any]]) -> None:
    begin = time.monotonic()
    while not task.is_done and time.monotonic() < begin + PATIENCE:
        time.sleep(POLL)
    if task.is_done:
        return
    with bar:
        shown = bar.add_task("cuneigh: compiling", total=len(all_of_them))
        while not task.is_done:
            bar.update(shown, completed=sum(each.is_done for each in all_of_them))
            time.sleep(POLL)


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
