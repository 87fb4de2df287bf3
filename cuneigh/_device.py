"""Devices and what they can do: plain records, so that planning needs no GPU."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any


@dataclass(frozen=True, slots=True)
class Device:
    """A CPU, or one CUDA device."""

    kind: str
    """``"cpu"`` or ``"cuda"``."""
    index: int = 0
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    sm_count: int = 0
    shared_memory: int = 0
    """Bytes of shared memory that one block may have."""
    memory: int = 0
    """Bytes of its memory; 0 for a device that is only compiled for."""

    @property
    def arch(self) -> str:
        """The architecture to compile for, such as ``sm_90``."""
        major, minor = self.capability
        return f"sm_{major}{minor}"


CPU = Device("cpu")

HOST_THREADS: ContextVar[int | None] = ContextVar("HOST_THREADS", default=None)
"""How many threads the caller's framework computes with on the CPU, if it says so."""

SHARED_MEMORY = {
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 8): 99,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (10, 7): 227,
    (11, 0): 227,
    (12, 0): 99,
    (12, 1): 99,
}
"""KiB of shared memory that one block may have, by compute capability."""


def of_capability(capability: tuple[int, int]) -> Device:
    """A device to compile for when there is none at hand."""
    memory = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values())) * 1024
    return Device("cuda", capability=capability, shared_memory=memory)


@cache
def cuda(index: int) -> Device:
    """The CUDA device `index`, asked of the driver once."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return Device(
        kind="cuda",
        index=index,
        name=properties["name"].decode(),
        capability=(properties["major"], properties["minor"]),
        sm_count=properties["multiProcessorCount"],
        shared_memory=properties["sharedMemPerBlockOptin"],
        memory=properties["totalGlobalMem"],
    )


@cache
def driver_library() -> ctypes.CDLL | None:
    """The CUDA driver's library; None where no driver is installed."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def driver_version() -> int:
    """The newest CUDA version that the driver supports (1000 major + 10 minor); 0 without one."""
    driver, version = driver_library(), ctypes.c_int()
    if driver is not None:
        driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def installation() -> str:
    """The command that installs what CUDA needs, of the version that this machine can use."""
    driver = driver_version() // 1000
    if _is_installed("cupy-cuda12x") or 0 < driver < 13:
        return "pip install 'cuneigh[cuda12]'"
    if _is_installed("cupy-cuda13x") or driver:
        return "pip install 'cuneigh[cuda13]'"
    return "pip install 'cuneigh[cuda13]', or 'cuneigh[cuda12]' for a driver older than 580"


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def current(index: int) -> AbstractContextManager[Any]:
    """Within it CUDA device `index` is current, and the driver knows that of this thread.

    Where that is so already, as when XLA calls, nothing is changed.
    """
    cuda = _cuda()
    if cuda.runtime.getDevice() != index:
        device: AbstractContextManager[Any] = cuda.Device(index)
        return device
    if not cuda.driver.ctxGetCurrent():  # a thread that has not used CUDA yet
        cuda.runtime.setDevice(index)
    return _HERE


@cache
def _cuda() -> Any:
    from cupy import cuda

    return cuda


_HERE: AbstractContextManager[None] = nullcontext()
