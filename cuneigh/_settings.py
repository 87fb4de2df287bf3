"""The environment variables that cuneigh reads, and what is legal in each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Generic, TypeVar

from cuneigh._messages import shown

Value = TypeVar("Value")


@dataclass(frozen=True)
class Setting(Generic[Value]):
    """An environment variable."""

    name: str
    legal: str
    """What its text may be, in the words of an error."""
    parse: Callable[[str], Value | None]
    """The value that a text stands for; None if the text is illegal."""
    default: str
    """What holds where it is not set, in words."""

    def read(self) -> Value | None:
        """Its value; None where it is not set or empty. Raises ValueError for an illegal text."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return None
        value = self.parse(text)
        if value is None:
            raise ValueError(
                f"the environment has {self.name}={shown(text)}, but it must be {self.legal}"
            )
        return value


_FLAGS = {"1": True, "true": True, "yes": True, "on": True}
_FLAGS |= {"0": False, "false": False, "no": False, "off": False}

_UNITS = {"": 1} | {
    f"{prefix}{middle}b": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
}

MOST_THREADS = 1024


def _flag(text: str) -> bool | None:
    return _FLAGS.get(text.lower())


def _bytes(text: str) -> int | None:
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?(?:e\d{1,2})?)\s*([a-z]*)", text.lower())
    if match is None or match[2] not in _UNITS:
        return None
    return int(Decimal(match[1]) * _UNITS[match[2]])


def _threads(text: str) -> int | None:
    if not re.fullmatch(r"\d{1,9}", text) or not 1 <= int(text) <= MOST_THREADS:
        return None
    return int(text)


def _path(text: str) -> Path | None:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user, or no home directory
        return None


FLAG = "0 or 1"

WORKSPACE_BYTES = Setting(
    "CUNEIGH_WORKSPACE_BYTES",
    "a number of bytes, such as 268435456, 256MiB or 1.5GB",
    _bytes,
    "256 MiB on the CPU, 512 MiB on a GPU",
)
NUM_THREADS = Setting(
    "CUNEIGH_NUM_THREADS",
    f"an integer from 1 to {MOST_THREADS}",
    _threads,
    "OMP_NUM_THREADS, else the usable cores",
)
ALLOW_TF32 = Setting("CUNEIGH_ALLOW_TF32", FLAG, _flag, "0")
PRINT_PLANS = Setting("CUNEIGH_PRINT_PLANS", FLAG, _flag, "0")
CACHE_DIR = Setting(
    "CUNEIGH_CACHE_DIR",
    "the path of a directory, in which ~ stands for a home directory that is known",
    _path,
    "cuneigh in the user's cache directory",
)
TUNED = Setting("CUNEIGH_TUNED", FLAG, _flag, "1")
QUIET = Setting("CUNEIGH_QUIET", FLAG, _flag, "0")
LINE_INFO = Setting("CUNEIGH_LINE_INFO", FLAG, _flag, "0")
TRUST_CACHE_DIR = Setting("CUNEIGH_TRUST_CACHE_DIR", FLAG, _flag, "0")

SETTINGS: tuple[Setting[Any], ...] = (
    CACHE_DIR,
    TRUST_CACHE_DIR,
    WORKSPACE_BYTES,
    NUM_THREADS,
    ALLOW_TF32,
    PRINT_PLANS,
    TUNED,
    QUIET,
    LINE_INFO,
)


def openmp_threads() -> int | None:
    """OMP_NUM_THREADS, a list whose first number is that of the outermost threads.

    It is not cuneigh's: as for OpenMP itself, an illegal one counts as not set.
    """
    return _threads(os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip())


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
