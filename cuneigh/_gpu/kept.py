"""What measurements have found out for each GPU, kept in JSON files of the cache directory.

A file that is stale, because it is of other kernels, or damaged counts as absent, and is replaced
when something is kept again. `CUNEIGH_TUNED=0` ignores all of them.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from cuneigh import _jit, _settings
from cuneigh._device import Device

SETTING = _settings.TUNED.name


def is_ignored() -> bool:
    """Whether the user wants what holds without measurements: CUNEIGH_TUNED=0."""
    return _settings.TUNED.read() is False


def version() -> str:
    """What everything in a file depends on beside the GPU."""
    return _jit.packaged().digest[:32]


def name_of(device: Device) -> str:
    """A model of GPUs."""
    return f"{device.name}, {device.sm_count} SMs"


def location(file: str) -> Path:
    return _jit.default_directory() / file


def read(path: Path) -> dict[str, dict[str, Any]]:
    """By GPU, what a file holds for it; nothing if it is stale, damaged or not there."""
    with suppress(OSError, ValueError):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("version") == version():
            gpus = document.get("gpus")
            if isinstance(gpus, dict) and all(isinstance(each, dict) for each in gpus.values()):
                return gpus
    return {}


def store(path: Path, device: Device, entries: dict[str, Any]) -> None:
    """Keep entries for a GPU, in place of older ones; OSError if they cannot be written."""
    gpus = read(path)
    gpus.setdefault(name_of(device), {}).update(entries)
    _jit.Cache(path.parent).make()
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump({"version": version(), "gpus": gpus}, file, indent=1)
    Path(file.name).replace(path)  # as a whole, for others may be reading it
