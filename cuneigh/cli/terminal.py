"""Tables and progress in a terminal: by `rich` where that is installed, plain otherwise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from cuneigh._progress import bar, counting

Item = TypeVar("Item")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)
) -> None:
    """Print rows of texts under the names of their columns, those in `left` to the left.

    A row of one text is a remark across the table.
    """
    if not (sys.stdout.isatty() and _print_rich(columns, rows, left)):
        _print_plain(columns, rows, left)


def _print_plain(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]
) -> None:
    cells = [columns, *(row for row in rows if len(row) > 1)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in (columns, *rows):
        if len(row) == 1:
            print(f"    {row[0]}")
            continue
        texts = [
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(texts).rstrip())


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> bool:
    """Whether rich could print it."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    console = Console()
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", no_wrap=i != 0)
    remarks: list[str] = []
    for row in rows:
        if len(row) > 1:
            table.add_row(*map(escape, row))
        else:
            remarks.append(row[0])
    console.print(table)
    for remark in remarks:
        console.print(f"[dim]{escape(remark)}[/dim]", highlight=False)
    return True


def progress(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar on standard error of how many are done where that is a terminal."""
    with counting(what, total) as advance:
        for item in items:
            yield item
            advance()


PATIENCE = 2.0
"""Seconds after which something that takes long says so."""


@contextmanager
def patience(what: str) -> Iterator[None]:
    """Say on standard error what is going on if it takes long: a terminal sees the time pass."""
    with ExitStack() as stack:

        def tell() -> None:
            shown = bar() if sys.stderr.isatty() else None
            if shown is None:
                print(f"{what} ..", file=sys.stderr, flush=True)
                return
            stack.enter_context(shown)
            shown.add_task(what, total=None)

        timer = threading.Timer(PATIENCE, tell)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
