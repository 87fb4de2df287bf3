"""Plans that were measured to be the fastest, kept for later calls (`profile --tune`).

A file (`kept`) holds, for each GPU and problem, the backend to take and, for each pass of it, the
text of the plan. A plan is found again by its text among those that the backend would try, so that
one that no longer exists counts as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._problem import Problem

Plan = TypeVar("Plan")

FILE = "tuned.json"


@dataclass(frozen=True)
class Entry:
    """What was the fastest for one problem on one GPU."""

    backend: str
    plans: Mapping[str, str]
    """By pass; passes that are not in it are left to the planner."""
    ms: float
    planner_ms: float
    """What the planner's own choice took, measured in the same run."""


def find(problem: Problem, device: Device) -> Entry | None:
    """The entry of a problem, if there is one that counts."""
    if kept.is_ignored() or device.kind != "cuda":
        return None
    return _entries(kept.location(FILE)).get((kept.name_of(device), repr(problem)))


def store(problem: Problem, device: Device, entry: Entry) -> None:
    """Keep an entry, in place of an older one; OSError if it cannot be written."""
    fields = {**vars(entry), "plans": dict(entry.plans)}
    kept.store(kept.location(FILE), device, {repr(problem): fields})
    _entries.cache_clear()


@cache
def _entries(path: Path) -> dict[tuple[str, str], Entry]:
    """Everything in the file, read once."""
    found = {}
    for gpu, problems in kept.read(path).items():
        for problem, fields in problems.items():
            with suppress(TypeError):
                entry = Entry(**fields)
                if isinstance(entry.backend, str) and isinstance(entry.plans, dict):
                    found[gpu, problem] = entry
    return found


# The choice of a plan

_forced: ContextVar[Mapping[str, Any] | None] = ContextVar("forced", default=None)


@contextmanager
def forcing(plans: Mapping[str, Any]) -> Iterator[None]:
    """Within it, backends take these plans, by pass, whatever the planner says: to measure them."""
    token = _forced.set(plans)
    try:
        yield
    finally:
        _forced.reset(token)


def plan(
    backend: str,
    pass_: str,
    problem: Problem,
    device: Device,
    to_try: Callable[[], Sequence[Plan]],
    by_planner: Callable[[], Plan],
) -> Plan:
    """The plan of one pass: one that is forced, that which was measured, or the planner's.

    `to_try` are the plans among which a text is looked for.
    """
    forced = _forced.get()
    if forced is not None:
        return forced.get(pass_) or by_planner()
    entry = find(problem, device)
    text = entry.plans.get(pass_) if entry is not None and entry.backend == backend else None
    if text is not None:
        for candidate in to_try():
            if repr(candidate) == text:
                return candidate
    return by_planner()
