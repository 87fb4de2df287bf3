"""Devices and what they can do: plain records, so that planning needs no GPU."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
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
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
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
