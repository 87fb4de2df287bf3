"""NVRTC: a translation unit in, a cubin out. Needs CuPy's bindings, but no GPU."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cuneigh._device import installation
from cuneigh._jit._sources import Kernel, Sources
from cuneigh._settings import LINE_INFO

STATISTICS = "--ptxas-options=-v"
"""Has the assembler say what a kernel takes."""
RESTRICT = "--restrict"
"""No memory that a kernel writes through one pointer is read or written through another.

NVRTC compiles with this whatever comes after the first program of a process that asked for it,
anybody's. With it always, a kernel is the same in every process.
"""
OPTIONS = ("--std=c++17", "-default-device", RESTRICT, STATISTICS)
"""What every kernel is compiled with, apart from what `options` adds."""
LINES = "-lineinfo"
"""Has cubins name the lines of the source, for profilers; they are three times as large with it."""

FINGERPRINT_BYTES = 1 << 16


class CompilationError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says what to change or install."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log
        """What NVRTC printed: file, line and reason of every error."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a thread or block of a kernel takes, as the assembler reports it. Sizes in bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    """Static shared memory."""
    advice: tuple[str, ...] = ()
    """Lines in which the assembler says that it had to slow the kernel down: C75xx, products of
    wgmma one after another."""


@dataclass(frozen=True, slots=True)
class Built:
    """What NVRTC makes of a kernel."""

    cubin: bytes
    symbol: str
    """The mangled name of the kernel in the cubin."""
    resources: Resources


def unavailable() -> str | None:
    """Why no kernel can be loaded on this machine, whatever its GPU; None when CuPy is there."""
    if platform.system() == "Darwin":
        return "there is no CUDA on macOS"
    if find_spec("cupy") is None:
        return f"CuPy is not installed: {installation()}"
    return None


@cache
def version() -> str | None:
    """NVRTC's version, such as "13.4"; None when it is not installed."""
    try:
        major, minor = _nvrtc().getVersion()
    except CompilationError:
        return None
    return f"{major}.{minor}"


@cache
def build_version() -> str | None:
    """NVRTC's version and what tells its builds apart, which make different code: "13.2-1a2b3c4d".

    NVRTC itself tells its build only in what it compiles.
    """
    number = version()
    if number is None:
        return None
    file = _library_file()
    return number if file is None else f"{number}-{_fingerprint(file)}"


def _library_file() -> Path | None:
    """The file of NVRTC's library."""
    try:
        pathfinder = import_module("cuda.pathfinder")
        return Path(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, OSError, RuntimeError, TypeError):
        return None


def _fingerprint(library: Path) -> str:
    """What tells a library from others, without reading the 100 MB that it has.

    Its first bytes have the linker's identifier of the build, the last ones the table of sections.
    """
    digest = hashlib.sha256(str(library.stat().st_size).encode())
    with library.open("rb") as file:
        digest.update(file.read(FINGERPRINT_BYTES))
        file.seek(-min(FINGERPRINT_BYTES, library.stat().st_size), os.SEEK_END)
        digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:8]


@cache
def architectures() -> tuple[str, ...]:
    """The architectures that NVRTC can compile for, such as sm_90, apart from variants (sm_90a)."""
    return tuple(f"sm_{number}" for number in _nvrtc().getSupportedArchs())


def options() -> tuple[str, ...]:
    """What kernels are compiled with now, apart from the architecture and the include directory."""
    return (*OPTIONS, LINES) if LINE_INFO.read() else OPTIONS


def build(kernel: Kernel, arch: str, sources: Sources) -> Built:
    """Compile `kernel` for `arch`, such as sm_80 or sm_90a."""
    nvrtc = _nvrtc()
    if not re.fullmatch(r"sm_\d+[af]?", arch) or arch.rstrip("af") not in architectures():
        raise CompilationError(
            f"NVRTC {version()} does not know the architecture {arch!r}; "
            f"it compiles for {', '.join(architectures())}"
        )
    if kernel.file not in sources.texts:
        raise CompilationError(f"there is no {kernel.file} in {sources.root}")
    given = (*options(), f"--gpu-architecture={arch}", f"-I{_header_directory()}")
    program = _program(nvrtc, kernel, sources)
    try:
        _compile(nvrtc, program, given)
        return Built(
            # CuPy takes the last byte for the end of a string. The driver does not miss it, but
            # tools that read kept kernels do (findings/cupy-getcubin-drops-last-byte.sh).
            cubin=nvrtc.getCUBIN(program) + b"\0",
            symbol=nvrtc.getLoweredName(program, kernel.instance),
            resources=_resources(_log(nvrtc, program)),
        )
    except nvrtc.NVRTCError as error:
        raise CompilationError(
            f"NVRTC {version()} cannot compile {kernel.file} of {sources.root} for {arch} "
            f"({error}) with this plan.cu:\n{kernel.unit}",
            _errors(nvrtc, kernel, sources, given),
        ) from None
    finally:
        nvrtc.destroyProgram(program)


_first = threading.Lock()
_has_compiled = False


def _compile(nvrtc: Any, program: Any, options: tuple[str, ...]) -> None:
    """Compile, any number of threads at a time; the first compilation of a process goes alone.

    In it NVRTC loads a second library, for which 13.0 does not have other threads wait: they fail.
    It is that of an empty kernel, so that those to come wait for a moment and not for a large one.
    """
    global _has_compiled
    if not _has_compiled:
        with _first:
            if not _has_compiled:
                empty = nvrtc.createProgram("__global__ void empty() {}", "empty.cu", (), ())
                try:
                    nvrtc.compileProgram(empty, options)
                finally:
                    nvrtc.destroyProgram(empty)
                _has_compiled = True
    nvrtc.compileProgram(program, options)


def _program(nvrtc: Any, kernel: Kernel, sources: Sources) -> Any:
    """What NVRTC is to compile."""
    names = tuple(name.encode() for name in sources.texts)
    texts = tuple(text.encode() for text in sources.texts.values())
    program = nvrtc.createProgram(kernel.unit, "plan.cu", texts, names)
    nvrtc.addNameExpression(program, kernel.instance)
    return program


def _errors(nvrtc: Any, kernel: Kernel, sources: Sources, options: tuple[str, ...]) -> str:
    """The log of a compilation that fails.

    It is compiled again without statistics: after these, NVRTC's log leaves out the errors of the
    assembler.
    """
    program = _program(nvrtc, kernel, sources)
    try:
        nvrtc.compileProgram(program, tuple(each for each in options if each != STATISTICS))
    except nvrtc.NVRTCError:
        pass  # as before
    finally:
        log = _log(nvrtc, program)
        nvrtc.destroyProgram(program)
    return log


def _log(nvrtc: Any, program: Any) -> str:
    return str(nvrtc.getProgramLog(program)).rstrip("\0\n")


@cache
def _nvrtc() -> Any:
    """CuPy's bindings of NVRTC, seen to work."""
    reason = unavailable()
    if reason is not None:
        raise CompilationError(f"CUDA kernels cannot be compiled: {reason}")
    try:
        nvrtc = import_module("cupy").cuda.nvrtc
        nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise CompilationError(
            f"CUDA kernels cannot be compiled, because NVRTC does not load: {installation()}",
            str(error),
        ) from error
    return nvrtc


@cache
def _header_directory() -> str:
    """The directory of cuda_fp16.h and cuda_bf16.h."""
    directory = header_directory()
    if directory is None:
        raise CompilationError(
            "CUDA kernels cannot be compiled: the CUDA runtime headers are missing: "
            + installation()
        )
    return directory


def header_directory() -> str | None:
    """Where the headers of the CUDA runtime are; None when they are not installed."""
    try:
        # A dependency of CuPy, which finds the headers in wheels, conda and system toolkits alike
        pathfinder = import_module("cuda.pathfinder")
    except ImportError:
        return None
    found = pathfinder.find_nvidia_header_directory("cudart")
    return None if found is None else str(found)


def _resources(log: str) -> Resources:
    """The sums and maxima over the functions of the program, helpers not inlined included."""

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, log)]

    return Resources(
        registers=max(numbers(r"Used (\d+) registers"), default=0),
        stack=max(numbers(r"(\d+) bytes (?:stack frame|cumulative stack size)"), default=0),
        spill_stores=sum(numbers(r"(\d+) bytes spill stores")),
        spill_loads=sum(numbers(r"(\d+) bytes spill loads")),
        shared=max(numbers(r"(\d+) bytes smem"), default=0),
        advice=tuple(line.strip() for line in log.splitlines() if re.search(r"\bC75\d\d\b", line)),
    )
