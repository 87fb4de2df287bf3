"""Plans that were measured to be the fastest, kept for later calls (`profile --tune`).

One JSON file in the cache directory holds, for each GPU and problem, the backend to take and, for
each pass of it, the text of the plan. A plan is found again by its text among those that the
backend would try, so that one that no longer exists counts as absent, and so does the whole file if
it is damaged or of another version of the kernels. `CUNEIGH_TUNED=0` ignores it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from cuneigh import _jit, _settings
from cuneigh._device import Device
from cuneigh._problem import Problem

Plan = TypeVar("Plan")

SETTING = _settings.TUNED.name


@dataclass(frozen=True)
class Entry:
    """What was the fastest for one problem on one GPU."""

    backend: str
    plans: Mapping[str, str]
    """By pass; passes that are not in it are left to the planner."""
    ms: float
    planner_ms: float
    """What the planner's own choice took, measured in the same run."""


def location() -> Path:
    """The file."""
    return _jit.default_directory() / "tuned.json"


def is_ignored() -> bool:
    """Whether the user wants the planner's own choices: CUNEIGH_TUNED=0."""
    return _settings.TUNED.read() is False


def version() -> str:
    """What an entry depends on beside GPU and problem."""
    return _jit.packaged().digest[:32]


def find(problem: Problem, device: Device) -> Entry | None:
    """The entry of a problem, if there is one that counts."""
    if is_ignored() or device.kind != "cuda":
        return None
    return _entries(location()).get((_name_of(device), repr(problem)))


def store(problem: Problem, device: Device, entry: Entry) -> None:
    """Keep an entry, in place of an older one; OSError if it cannot be written."""
    path = location()
    document = _read(path)
    entries = document.setdefault("gpus", {}).setdefault(_name_of(device), {})
    entries[repr(problem)] = {**vars(entry), "plans": dict(entry.plans)}
    _jit.Cache(path.parent).make()
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump(document, file, indent=1)
    Path(file.name).replace(path)  # as a whole, for others may be reading it
    _entries.cache_clear()


def _name_of(device: Device) -> str:
    return f"{device.name}, {device.sm_count} SMs"


@cache
def _entries(path: Path) -> dict[tuple[str, str], Entry]:
    """Everything in the file, read once."""
    found = {}
    for gpu, problems in _read(path).get("gpus", {}).items():
        for problem, fields in problems.items():
            with suppress(TypeError):
                entry = Entry(**fields)
                if isinstance(entry.backend, str) and isinstance(entry.plans, dict):
                    found[gpu, problem] = entry
    return found


def _read(path: Path) -> dict[str, Any]:
    """The document; an empty one of this version if the file is stale, damaged or not there."""
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("version") == version():
            gpus = document.get("gpus")
            if isinstance(gpus, dict) and all(isinstance(each, dict) for each in gpus.values()):
                return document
    return {"version": version()}


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
