"""NumPy's BLAS without threads of its own, as long as problems are computed.

They would fight for the cores with the threads that compute the boxes of a problem. Some libraries
have a number of threads for each thread that calls them. That of the others, OpenBLAS among them,
belongs to the whole process, where more than this package sets it: with threadpoolctl, everybody
reads the number, sets another and puts back what they read, in whatever order their calls end.

So nobody else may read the 1 that is set here, nor lose what they set meanwhile. While problems are
computed, threadpoolctl reads and writes a number that is kept here instead; the BLAS gets it when
the last problem ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from threadpoolctl import ThreadpoolController


class _Library(NamedTuple):
    """A BLAS library of the process; `read` and `write` its number of threads as it is."""

    file: str
    is_process_wide: bool
    read: Callable[[], int]
    write: Callable[[int], object]


_lock = threading.Lock()
_computing = 0
"""Threads that compute now."""
_shown: dict[str, int] = {}
"""By library file, what all others take for its number of threads while some compute."""


@contextmanager
def one_thread() -> Iterator[None]:
    """A context in which every BLAS uses the calling thread alone."""
    libraries = _libraries()
    own = [(library, library.read()) for library in libraries if not library.is_process_wide]
    process_wide = [library for library in libraries if library.is_process_wide]
    _begin(process_wide)
    try:
        for library, _ in own:
            library.write(1)
        yield
    finally:
        for library, number in own:
            library.write(number)
        _end(process_wide)


def _begin(libraries: list[_Library]) -> None:
    global _computing
    with _lock:
        if _computing == 0:
            _shown.update((library.file, library.read()) for library in libraries)
        _computing += 1
        for library in libraries:
            if library.read() != 1:
                library.write(1)


def _end(libraries: list[_Library]) -> None:
    global _computing
    with _lock:
        _computing -= 1
        if _computing == 0:
            _show(libraries)


def _show(libraries: list[_Library]) -> None:
    """Make what others have been shown true."""
    for library in libraries:
        if library.read() == 1:  # else somebody has set it without threadpoolctl
            library.write(_shown[library.file])
    _shown.clear()


def _after_fork() -> None:
    """The threads that computed are not there in the new process."""
    global _lock, _computing
    _lock, _computing = threading.Lock(), 0
    if _shown:
        _show([library for library in _libraries() if library.is_process_wide])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _libraries() -> list[_Library]:
    """Those that the process has loaded, NumPy's among them."""
    with _lock:  # they are watched once
        return _found()


@cache
def _found() -> list[_Library]:
    watched: dict[type, tuple[Any, Any]] = {}
    libraries = []
    for controller in ThreadpoolController().select(user_api="blas").lib_controllers:
        if controller.get_num_threads() is None:  # an old library that cannot be asked
            continue
        kind = type(controller)
        of_thread = (
            controller.internal_api == "mkl"
            or getattr(controller, "threading_layer", None) == "openmp"
        )
        write_name = _write_name(kind)
        if not of_thread and kind not in watched:
            watched[kind] = kind.get_num_threads, getattr(kind, write_name)
            _watch(kind, write_name)
        read, write = watched.get(kind) or (kind.get_num_threads, getattr(kind, write_name))
        libraries.append(
            _Library(
                controller.filepath,
                not of_thread,
                read.__get__(controller),
                write.__get__(controller),
            )
        )
    return libraries


def _write_name(kind: type) -> str:
    """The method of a controller that sets the number, whichever thread calls it."""
    # From threadpoolctl 3.8 on, `set_num_threads` of OpenBLAS does nothing in a thread other than
    # the first that called it.
    return "_real_set_num_threads" if hasattr(kind, "_real_set_num_threads") else "set_num_threads"


def _watch(kind: Any, write_name: str) -> None:
    """Have threadpoolctl read and write what is shown, where something is."""
    read, write = kind.get_num_threads, getattr(kind, write_name)

    def get_num_threads(self: Any) -> Any:
        shown = _shown.get(self.filepath)
        return read(self) if shown is None else shown

    def set_num_threads(self: Any, number: int) -> Any:
        with _lock:
            if self.filepath not in _shown:
                return write(self, number)
            _shown[self.filepath] = number

    kind.get_num_threads = get_num_threads
    setattr(kind, write_name, set_num_threads)
