"""Kernels looked up in a cache and compiled when they are not there."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from cuneigh._jit import _compiler
from cuneigh._jit._cache import Cache, Compiled, default_directory, shared
from cuneigh._jit._sources import Kernel, Sources, packaged
from cuneigh._jit._threads import Threads, drop


def key_of(kernel: Kernel, arch: str, sources: Sources) -> str:
    """The name of a kernel in a cache: whatever the cubin depends on, apart from NVRTC's version.

    The CUDA headers are taken to be those of that version. The name is that of one directory: the
    folders of the kernel's own name become parts of it.
    """
    digest = hashlib.sha256()
    for part in (sources.digest, kernel.unit, *_compiler.options()):
        digest.update(part.encode() + b"\0")
    name = kernel.name.replace("/", ".")
    return f"{name}-{kernel.target(arch)}-{digest.hexdigest()[:32]}"


def find(
    kernel: Kernel, arch: str, *, cache: Cache | None = None, sources: Sources | None = None
) -> Compiled | None:
    """`kernel` for `arch` if the cache holds it."""
    cache = cache or shared(default_directory())
    return cache.find(key_of(kernel, arch, sources or packaged()), _compiler.build_version())


def compile(
    kernel: Kernel, arch: str, *, cache: Cache | None = None, sources: Sources | None = None
) -> Compiled:
    """`kernel` to run on `arch` (such as sm_80 or sm_90a), compiled unless the cache holds it.

    Needs no GPU. Raises CompilationError.
    """
    cache = cache or shared(default_directory())
    sources = sources or packaged()
    found = find(kernel, arch, cache=cache, sources=sources)
    if found is not None:
        return found
    built = _compiler.build(kernel, kernel.target(arch), sources)
    version = _compiler.build_version()
    assert version is not None, "NVRTC has just compiled"
    return cache.store(key_of(kernel, arch, sources), version, kernel.unit, built)


def precompile(
    kernels: Iterable[Kernel],
    archs: Iterable[str],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    jobs: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> dict[tuple[Kernel, str], Compiled]:
    """Fill a cache directory, the usual one by default, with every kernel for every architecture.

    Needs no GPU. `jobs` kernels are compiled at a time, one per processor by default, and `on_done`
    is called after each. Raises CompilationError, or OSError when the directory cannot be written
    to.
    """
    cache = Cache(default_directory() if cache_dir is None else Path(cache_dir))
    cache.make()  # fails now rather than after the first kernel
    # Once each: problems of one model have many kernels in common.
    tasks = list(dict.fromkeys(itertools.product(kernels, archs)))

    def one(kernel: Kernel, arch: str) -> Compiled:
        compiled = compile(kernel, arch, cache=cache)
        on_done()
        return compiled

    threads = Threads(jobs or os.cpu_count() or 1)  # NVRTC releases the GIL
    running = {task: threads.submit(partial(one, *task)) for task in tasks}
    try:
        return {task: each.result() for task, each in running.items()}
    finally:
        drop(running.values())
        threads.end()
