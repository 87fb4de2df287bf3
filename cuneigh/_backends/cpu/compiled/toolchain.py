"""Numba: whether it is there, and the kernels that it has compiled, in this process and on disk.

Nothing imports it before a problem is to be computed by it. What it compiles is kept in cuneigh's
cache directory, where CUDA kernels are, by the sources, the sizes of heads and the processor.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from cuneigh import _jit
from cuneigh._problem import DTYPES, SUPPORTED
from cuneigh._settings import QUIET

OLDEST = 0, 61
"""The first version that takes NumPy 2.1."""

VECTOR_BYTES = {"avx512f": 64, "avx": 32}
"""By what a processor says of itself, the best first; 16 for all others."""

_lock = threading.RLock()


def missing() -> str | None:
    """Why nothing can be compiled; None if it can, as far as is known without importing Numba."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "NUMBA_DISABLE_JIT is set"
    found = version()
    if found is None:
        return "numba is not installed (pip install 'cuneigh[numba]')"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"numba {found} is too old: {'.'.join(map(str, OLDEST))} or later is needed"
    return _failure


@cache
def version() -> str | None:
    """That of the Numba that is installed."""
    try:
        return importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return None


_failure: str | None = None
"""Why Numba cannot be used although it is installed."""


def compiled(
    name: str, head_dim: int, value_dim: int, dtype: str, lanes: int
) -> Callable[..., None] | None:
    """The kernel of `kernels` of that name, compiled; None, and a warning, if that fails."""
    global _failure
    with _lock:
        try:
            return _compiled(name, head_dim, value_dim, dtype, lanes)
        except Exception as error:  # Numba, LLVM and versions of NumPy that do not go together
            _failure = f"numba {version()} does not work here: {type(error).__name__}: {error}"
            _jit.warn(f"cuneigh computes without it: {_failure}")
            return None


@cache
def vector_size(bits: int) -> int:
    """Numbers of so many bits in a vector of this processor."""
    features = _features()
    size = next((size for name, size in VECTOR_BYTES.items() if features.get(name)), 16)
    return max(8 * size // bits, 4)


def converts(dtype: str) -> bool:
    """Whether this processor has instructions that widen and narrow vectors of `dtype`."""
    return dtype != "float16" or any(_features().get(name) for name in ("f16c", "avx512f", "neon"))


@cache
def _features() -> dict[str, bool]:
    """Those of this processor, by LLVM's names."""
    try:
        from llvmlite import binding

        return dict(binding.get_host_cpu_features())
    except Exception:  # which `compiled` will tell
        return {}


@cache
def _compiled(
    name: str, head_dim: int, value_dim: int, dtype: str, lanes: int
) -> Callable[..., None]:
    numba = _imported()
    from cuneigh._backends.cpu.compiled.kernels import OPTIONS, SIGNATURES, kernels

    accumulator = SUPPORTED[dtype].accumulator
    vector = vector_size(8 * DTYPES[accumulator])
    # Half of the registers for sums; AVX-512 has twice as many as the others.
    registers = 16 if vector * DTYPES[accumulator] == max(VECTOR_BYTES.values()) else 8
    made: Any = kernels(head_dim, value_dim, dtype, lanes, max(registers * vector // lanes, 1))
    dispatcher = numba.njit(**OPTIONS)(getattr(made, name))
    kernel = f"{name}-{head_dim}-{value_dim}-{dtype}-{lanes}"
    described = f"{name}, heads of {head_dim} and {value_dim} in {dtype}"
    dispatcher._cache = _cache_class()(dispatcher.py_func, kernel, described)
    dispatcher.compile(SIGNATURES[name](accumulator))
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


def _imported() -> Any:
    """The module. An import that is interrupted leaves nothing of it that the next would meet."""
    known = set(sys.modules)
    try:
        return importlib.import_module("numba")
    except BaseException:
        for name in set(sys.modules) - known:
            if name.split(".")[0] == "numba":
                del sys.modules[name]
        raise


def _after_fork() -> None:
    """In the child: a thread that held the lock, and Numba's own ones, is not there any more."""
    global _lock, _failure
    if _lock.acquire(blocking=False):
        _lock.release()
        return
    _lock = threading.RLock()
    _failure = "this process was forked while another thread compiled"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# What is kept on disk


@cache
def _cache_class() -> type:
    """Numba's cache of a function, with another place and key than Numba would choose."""
    from numba.core import caching

    class Locator(caching._CacheLocator):  # type: ignore[misc]
        def __init__(self, directory: Path, kernel: str) -> None:
            self._directory, self._kernel = directory, kernel

        def get_cache_path(self) -> str:
            return str(self._directory)

        def get_source_stamp(self) -> str:
            return _digest()

        def get_disambiguator(self) -> str:
            return self._kernel

    class Place(caching.CompileResultCacheImpl):  # type: ignore[misc]
        def __init__(self, kernel: str) -> None:
            self._locator = Locator(_jit.default_directory() / "numba", kernel)
            self._lineno = 0
            self._filename_base = self.get_filename_base("kernels", getattr(sys, "abiflags", ""))

    class KernelCache(caching.Cache):  # type: ignore[misc]
        def __init__(self, function: Any, kernel: str, described: str) -> None:
            self._impl_class = lambda _: Place(kernel)
            super().__init__(function)
            self._described = described

        def load_overload(self, signature: Any, context: Any) -> Any:
            found = None
            if self._is_trusted():
                try:
                    found = super().load_overload(signature, context)
                except Exception:  # a damaged file counts as absent, and is written again
                    with suppress(OSError):
                        self.flush()
            if found is None:
                _tell(self._described, self.cache_path)
            return found

        def save_overload(self, signature: Any, result: Any) -> None:
            if not self._is_trusted():
                return
            try:
                super().save_overload(signature, result)
            except OSError as error:
                where = f"cannot be kept in {self.cache_path}: {error}"
                _jit.warn(f"compiled loops for {self._described} {where}")

        def _is_trusted(self) -> bool:
            """Whether nobody else can have written what is kept there."""
            place = Path(self.cache_path)
            reasons = [_jit.distrusted(each) for each in (place.parent, place) if each.is_dir()]
            reason = next(filter(None, reasons), None)
            if reason is not None:
                _jit.warn(f"compiled loops are not kept: {reason}")
            return reason is None

        def _index_key(self, signature: Any, codegen: Any) -> Any:
            return signature, codegen.magic_tuple()

    return KernelCache


@cache
def _digest() -> str:
    """That of the sources of the backend."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _tell(described: str, directory: str) -> None:
    if not QUIET.read() and sys.stderr is not None:
        print(
            f"cuneigh: compiling loops for {described}, once: they are kept in {directory}",
            file=sys.stderr,
            flush=True,
        )
