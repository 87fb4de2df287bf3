"""How far something is that takes long: by `rich`, on a terminal, where that is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cuneigh._settings import QUIET


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal that moves whenever what it gives is called, by any thread.

    There is none with CUNEIGH_QUIET=1.
    """
    shown = bar() if sys.stderr and sys.stderr.isatty() and not QUIET.read() else None
    if shown is None:
        yield lambda: None
        return
    with shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)


def bar() -> Any:
    """A bar of rich; None where that is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        return None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
