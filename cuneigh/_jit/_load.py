"""The kernels that this process has loaded, ready to launch, and those being compiled for it.

What several kernels need to be compiled is `start`ed for all of them before the first is loaded:
NVRTC compiles each in a thread of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import cache, partial
from typing import Any

from cuneigh._device import Device, current, installation
from cuneigh._jit import _compiler, _progress
from cuneigh._jit._build import compile, find
from cuneigh._jit._cache import Compiled
from cuneigh._jit._compiler import CompilationError
from cuneigh._jit._sources import Kernel
from cuneigh._jit._threads import Task, Threads

_loaded: dict[tuple[Kernel, int], Any] = {}
_loading = threading.Lock()
_started: dict[tuple[Kernel, tuple[int, int]], Task[Compiled]] = {}
"""What is being compiled, by kernel and compute capability, until it is loaded."""
_ready: dict[tuple[Kernel, tuple[int, int]], Compiled] = {}
"""What was found in the cache instead, so that it is looked for once."""
_starting = threading.Lock()


@cache
def _compilers() -> Threads:
    return Threads(os.cpu_count() or 1)


def start(kernels: Iterable[Kernel], device: Device) -> None:
    """Have those kernels that are not there yet compiled for `device`, all at a time.

    Returns at once. An error is raised where the kernel is loaded.
    """
    with _starting:
        missing = []
        for kernel in kernels:
            key = kernel, device.capability
            if (kernel, device.index) in _loaded or key in _started:
                continue
            found = stored(kernel, device)
            if found is None:
                missing.append(kernel)
            else:
                _ready[key] = found
        if not missing or _compiler.version() is None:
            return
        _progress.tell(missing, device.arch)
        with suppress(RuntimeError):  # no thread can be started any more: `load` compiles then
            for kernel in missing:
                task = _compilers().submit(partial(choose, kernel, device))
                _started[kernel, device.capability] = task


def load(kernel: Kernel, device: Device) -> Any:
    """`kernel` as a `cupy.RawKernel` of `device`; a dictionary look-up from the second call on."""
    function = _loaded.get((kernel, device.index))
    if function is None:
        with _loading:
            function = _loaded.get((kernel, device.index))
            if function is None:
                function = _loaded[kernel, device.index] = _load(kernel, device)
    return function


def _load(kernel: Kernel, device: Device) -> Any:
    import cupy

    compiled = _compiled(kernel, device)
    with current(device.index):
        try:
            function = cupy.RawModule(path=str(compiled.cubin)).get_function(compiled.symbol)
            function.kernel  # noqa: B018 - loads the module, which CuPy may put off until now
        except cupy.cuda.driver.CUDADriverError as error:
            driver = cupy.cuda.runtime.driverGetVersion()
            raise CompilationError(
                f"the driver, which supports CUDA {driver // 1000}.{driver % 1000 // 10}, does not "
                f"load {compiled.cubin} on {device.name} ({error}): update the driver, or "
                f"{installation()}"
            ) from error
    return function


def _compiled(kernel: Kernel, device: Device) -> Compiled:
    """`kernel` compiled for `device`, by a thread that was started for it or here."""
    key = kernel, device.capability
    ready, task = _ready.pop(key, None), _started.get(key)
    if ready is not None:
        return ready
    if task is None:
        return choose(kernel, device)
    try:
        return _progress.wait(task, list(_started.values()))
    finally:
        if task.is_done:  # otherwise the wait was interrupted, and the next call goes on with it
            _started.pop(key, None)


def stored(kernel: Kernel, device: Device) -> Compiled | None:
    """What the cache holds of `kernel` for `device`.

    Where there is no NVRTC, anything that runs on the device will do.
    """
    own, older = _targets(kernel, device)
    for arch in own if _compiler.version() is not None else own + older:
        compiled = find(kernel, arch)
        if compiled is not None:
            return compiled
    return None


def choose(kernel: Kernel, device: Device) -> Compiled:
    """`kernel` compiled for `device`.

    What was compiled for exactly this kind of device is taken from the cache. Otherwise it is
    compiled for the best architecture that NVRTC knows.
    """
    compiled = stored(kernel, device)
    if compiled is not None:
        return compiled
    known = _compiler.architectures()  # the error to report when there is no NVRTC
    own, older = _targets(kernel, device)
    for arch in own + older:
        if arch.rstrip("a") in known:
            return compile(kernel, arch)
    raise CompilationError(
        f"NVRTC {_compiler.version()} compiles for {', '.join(known)}, and none of these runs on "
        f"{device.name}, which is {device.arch}: install another CUDA version"
    )


def _targets(kernel: Kernel, device: Device) -> tuple[list[str], list[str]]:
    """`architectures_of` for a kernel that may need one architecture alone."""
    return ([kernel.target(device.arch)], []) if kernel.arch_specific else architectures_of(device)


def architectures_of(device: Device) -> tuple[list[str], list[str]]:
    """What code for `device` may be compiled for, best first: for it alone, or for older ones.

    From 9.0 on, devices have instructions (wgmma, TMA) that need the architecture's "a" variant.
    Code for an older device of the same major version runs, too, but no "a" variant of it.
    """
    major, minor = device.capability
    own = [f"{device.arch}a"] * (major >= 9) + [device.arch]
    return own, [f"sm_{major}{older}" for older in reversed(range(minor))]
