"""The kernels that this process has loaded, ready to launch."""

from __future__ import annotations

import threading
from typing import Any

from cuneigh._device import Device, current
from cuneigh._jit import _compiler
from cuneigh._jit._build import compile, find
from cuneigh._jit._cache import Compiled
from cuneigh._jit._compiler import CompilationError
from cuneigh._jit._sources import Kernel

_loaded: dict[tuple[Kernel, int], Any] = {}
_loading = threading.Lock()


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

    compiled = choose(kernel, device)
    with current(device.index):
        try:
            function = cupy.RawModule(path=str(compiled.cubin)).get_function(compiled.symbol)
            function.kernel  # noqa: B018 - loads the module, which CuPy may put off until now
        except cupy.cuda.driver.CUDADriverError as error:
            driver = cupy.cuda.runtime.driverGetVersion()
            raise CompilationError(
                f"the driver, which supports CUDA {driver // 1000}.{driver % 1000 // 10}, does not "
                f"load {compiled.cubin} on {device.name} ({error}): update the driver, or install "
                "the CUDA version of cuneigh that matches it ('cuneigh[cuda12]', 'cuneigh[cuda13]')"
            ) from error
    return function


def choose(kernel: Kernel, device: Device) -> Compiled:
    """`kernel` compiled for `device`.

    What was compiled for exactly this kind of device is taken from the cache. Otherwise it is
    compiled for the best architecture that NVRTC knows; without NVRTC, anything in the cache that
    runs on the device will do.
    """
    own, older = architectures_of(device)
    if kernel.arch_specific:
        own, older = [kernel.target(device.arch)], []
    installed = _compiler.version() is not None
    for arch in own if installed else own + older:
        compiled = find(kernel, arch)
        if compiled is not None:
            return compiled
    known = _compiler.architectures()  # the error to report when there is no NVRTC
    for arch in own + older:
        if arch.rstrip("a") in known:
            return compile(kernel, arch)
    raise CompilationError(
        f"NVRTC {_compiler.version()} compiles for {', '.join(known)}, and none of these runs on "
        f"{device.name}, which is {device.arch}: install another CUDA version"
    )


def architectures_of(device: Device) -> tuple[list[str], list[str]]:
    """What code for `device` may be compiled for, best first: for it alone, or for older ones.

    From 9.0 on, devices have instructions (wgmma, TMA) that need the architecture's "a" variant.
    Code for an older device of the same major version runs, too, but no "a" variant of it.
    """
    major, minor = device.capability
    own = [f"{device.arch}a"] * (major >= 9) + [device.arch]
    return own, [f"sm_{major}{older}" for older in reversed(range(minor))]
