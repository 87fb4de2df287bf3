"""The floating-point environment of XLA's threads, which is not that of others.

On the CPU they are set to take subnormal numbers for zero, and threads that a backend starts, which
serve other frameworks as well, inherit that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FENV_BYTES = 256
"""More than a ``fenv_t`` takes anywhere."""


def _c_library() -> Any:
    """The C library of the process; None where it cannot be asked for the environment."""
    try:
        library = ctypes.PyDLL(None)
        return library if library.fegetenv and library.fesetenv else None
    except (AttributeError, OSError, TypeError):
        return None


_c = _c_library()


def _current() -> Any:
    """The environment of the current thread."""
    environment = ctypes.create_string_buffer(FENV_BYTES)
    _c.fegetenv(environment)
    return environment


_usual = _current() if _c else None


@contextmanager
def usual() -> Iterator[None]:
    """Compute as in the thread that imported this module, which was none of XLA's."""
    if _c is None:
        yield
        return
    before = _current()
    _c.fesetenv(_usual)
    try:
        yield
    finally:
        _c.fesetenv(before)
