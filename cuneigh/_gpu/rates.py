"""The rates that predictions are made of: those of an H200, or those of the GPU at hand if known.

Every backend has its rates in a named tuple (`linear`), with what was fitted to an H200 as
defaults. `profile --calibrate` fits them to a GPU and keeps them in a file (`kept`).
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from cuneigh._device import Device
from cuneigh._gpu import kept
from cuneigh._gpu.linear import Rates, Speed, leaves, replaced

CYCLES = 132 * 1.755e6
"""Cycles of one multiprocessor, times the number of them, in a millisecond of an H200.

What cycles were counted in when they were fitted, and are counted in on every other GPU.
"""

# What an H200 reaches.

MEMORY_BYTES = Speed(4.1e9)
"""Bytes that kernels read from and write to memory in a millisecond (bench/NOTES.md)."""
CACHE_BYTES = Speed(15e9)
"""Bytes that are read again from the L2 cache in a millisecond."""
LAUNCH_MS = 0.003
"""Milliseconds that one more launch adds to a call."""

FILE = "rates.json"


def of(backend: str, device: Device, default: Rates) -> Rates:
    """The rates of a backend on `device`: `default` unless others were fitted to it."""
    if kept.is_ignored() or device.kind != "cuda":
        return default
    return _found(kept.location(FILE), kept.name_of(device), backend, default)  # type: ignore[no-any-return]


def store(device: Device, fitted: dict[str, tuple[Any, ...]], default: dict[str, Any]) -> None:
    """Keep the rates of backends, which were fitted where `default` are those of an H200."""
    entries = {
        backend: {"fitted": leaves(rates), "default": leaves(default[backend])}
        for backend, rates in fitted.items()
    }
    kept.store(kept.location(FILE), device, entries)
    forget()


def forget() -> None:
    """Have the file read anew."""
    _found.cache_clear()
    _gpus.cache_clear()


@cache
def _found(path: Path, gpu: str, backend: str, default: Any) -> Any:
    """What the file has for a backend on a GPU, if it counts; else the default."""
    entry = _gpus(path).get(gpu, {}).get(backend)
    expected = leaves(default)
    # Rates of a cost model that has changed since tell nothing.
    if not isinstance(entry, dict) or entry.get("default") != expected:
        return default
    fitted = entry.get("fitted")
    if not isinstance(fitted, dict) or fitted.keys() != expected.keys():
        return default
    if not all(_is_rate(rate, positive=expected[path] > 0) for path, rate in fitted.items()):
        return default
    return replaced(default, fitted)


def _is_rate(number: object, positive: bool) -> bool:
    """Whether something read may be a rate: what was positive stays so, for some rates divide."""
    if not isinstance(number, int | float) or not math.isfinite(number):
        return False
    return number > 0 if positive else number >= 0


@cache
def _gpus(path: Path) -> dict[str, dict[str, Any]]:
    """Everything in the file, read once."""
    return kept.read(path)
