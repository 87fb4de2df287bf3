"""`python -m cuneigh doctor`: what is installed, which backends work and why others do not.

Ends with a self-test of every backend that works, and the exit code is 0 unless something that
ought to work does not. A missing GPU is no fault; a GPU that cannot be used is one.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import platform
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import threadpoolctl

import cuneigh
from cuneigh import _backends, _jit, reference
from cuneigh._backends import Backend
from cuneigh._device import CPU, Device, cuda, driver_library, driver_version, installation
from cuneigh._jit import _compiler
from cuneigh._parameters import Window
from cuneigh._problem import DTYPES, Operands, Problem, Spec
from cuneigh._settings import SETTINGS
from cuneigh._validate import attention_problem


def add_parser(subparsers: Any) -> None:
    subparsers.add_parser(
        "doctor",
        help="show what works here and why the rest does not, then test it",
        description="Show what cuneigh finds on this machine, which backends work and why others "
        "do not; then compare those that work with the float64 reference. The exit code is 1 if "
        "something is wrong.",
    )


def run(options: argparse.Namespace) -> int:
    report = Report()
    _packages(report)
    _settings(report)
    devices = [CPU, *_gpus(report)]
    _compilation(report, devices)
    _working_backends(report, devices)
    _self_tests(report, devices)
    return report.finish()


class Report:
    """Lines printed as they are found, and the problems among them to repeat at the end."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def line(self, label: str, text: str) -> None:
        print(f"  {label:13} {text}", flush=True)

    def problem(self, label: str, text: str) -> None:
        self.line(label, f"PROBLEM {len(self.problems) + 1}")
        self.problems.append(f"{label}: {text}")

    def finish(self) -> int:
        if not self.problems:
            print("\nAll that should work here works.")
            return 0
        self.heading("Problems")
        for number, text in enumerate(self.problems, 1):
            print(f"  {number}. " + text.replace("\n", "\n     "))
        return 1


# What is installed


def _packages(report: Report) -> None:
    print(f"cuneigh {cuneigh.__version__} in {Path(cuneigh.__file__).parent}")
    report.heading("Packages")
    report.line("Python", f"{platform.python_version()} on {platform.platform()}")
    report.line("NumPy", np.__version__)
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            name = f"{library['internal_api']} {library['version']}"
            report.line("BLAS", f"{name}, {library['num_threads']} threads")
    for label, name in (("ml_dtypes", "ml_dtypes"), ("PyTorch", "torch"), ("JAX", "jax")):
        report.line(label, metadata.version(name) if find_spec(name) else "not installed")


def _settings(report: Report) -> None:
    """The environment variables; an illegal one is a problem wherever it is read."""
    report.heading("Environment variables")
    for setting in SETTINGS:
        try:
            value = setting.read()
        except ValueError as error:
            report.problem(setting.name, str(error))
            continue
        text = f"not set: {setting.default}" if value is None else str(value)
        print(f"  {setting.name:26}{text}")


def _gpus(report: Report) -> list[Device]:
    """The CUDA devices that can be used."""
    report.heading("GPU")
    driver, present = _driver()
    report.line("driver", f"supports CUDA {_dotted(driver)}" if driver else "none")
    missing = _jit.unavailable()
    if missing is not None:
        if present:
            report.problem("CuPy", f"there is a GPU, but {missing}")
        else:
            report.line("CuPy", missing)
        return []
    try:
        import cupy

        runtime = cupy.cuda.runtime.runtimeGetVersion()
    except (ImportError, RuntimeError) as error:
        report.problem("CuPy", f"it is installed, but does not work: {error}")
        return []
    report.line("CuPy", f"{cupy.__version__} with CUDA {_dotted(runtime)}")
    if not present:
        report.line("devices", "none: only the cpu backend runs here")
        return []
    try:
        devices = [cuda(index) for index in range(cupy.cuda.runtime.getDeviceCount())]
    except cupy.cuda.runtime.CUDARuntimeError as error:
        report.problem(
            "devices",
            f"CuPy cannot use them: {error}; the driver supports CUDA {_dotted(driver)} and CuPy "
            f"is built for {_dotted(runtime)}: update the driver, or {installation()}",
        )
        return []
    for device in devices:
        major, minor = device.capability
        text = f"{device.name}, compute capability {major}.{minor}, {device.sm_count} SMs"
        report.line(f"device {device.index}", text)
    return devices


def _driver() -> tuple[int, int]:
    """The newest CUDA version that the driver supports (1000 major + 10 minor), and its GPUs."""
    driver = driver_library()
    if driver is None:
        return 0, 0
    count = ctypes.c_int()
    if driver.cuInit(0) == 0:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return driver_version(), count.value


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _compilation(report: Report, devices: list[Device]) -> None:
    """NVRTC, its headers and the cache. Missing ones are a problem only where there is a GPU."""
    report.heading("Kernels")
    needed = report.problem if len(devices) > 1 else report.line
    version = _compiler.version()
    if version is None:
        needed("NVRTC", f"missing, so that only the cached kernels run: {installation()}")
    else:
        report.line("NVRTC", f"{version}, for {', '.join(_compiler.architectures())}")
    headers = _compiler.header_directory()
    if headers is None:
        needed("headers", f"of the CUDA runtime are missing: {installation()}")
    else:
        report.line("headers", headers)
    try:
        cache = _jit.Cache(_jit.default_directory())
    except ValueError:  # of an environment variable, which has been told
        return
    try:
        cache.make()
        tempfile.TemporaryFile(dir=cache.root).close()
    except OSError as error:
        advice = "set CUNEIGH_CACHE_DIR to a directory that can be written to"
        needed("cache", f"it cannot be used ({error}): {advice}")
    kernels, size = cache.contents()
    report.line("cache", f"{cache.root}, {kernels} kernels, {size / 2**20:.1f} MiB")


# Which backends work


def _working_backends(report: Report, devices: list[Device]) -> None:
    report.heading("Backends")
    for backend in _backends.BACKENDS:
        # That of the first dtype that runs, if one does: some backends are for half precision.
        reasons = [
            min((_case(backend, device, dtype)[1] or "" for dtype in DTYPES), key=bool)
            for device in devices
        ]
        usable = [
            _label(device) for device, reason in zip(devices, reasons, strict=True) if not reason
        ]
        # The last device is a GPU if there is one, and GPUs are what most backends are for.
        text = "on " + ", ".join(usable) if usable else f"no: {reasons[-1]}"
        about = getattr(backend, "about", None)
        report.line(backend.NAME, f"{text}, {about()}" if about else text)


def _label(device: Device) -> str:
    return "CPU" if device.kind == "cpu" else f"GPU {device.index}"


def _self_tests(report: Report, devices: list[Device]) -> None:
    report.heading("Self-test: na2d and na2d_backward against the float64 reference")
    for device in devices:
        for backend in _backends.BACKENDS:
            for dtype in DTYPES:
                problem, reason = _case(backend, device, dtype)
                if not reason:
                    _self_test(report, backend, device, problem)


def _self_test(report: Report, backend: Backend, device: Device, problem: Problem) -> None:
    dtype = problem.dtype
    label = f"{backend.NAME}, {_label(device)}"
    start = time.perf_counter()
    try:
        errors = _errors(backend.NAME, device, problem)
    except Exception as error:  # whatever it is, it is what the user came to see
        report.problem(label, f"{dtype}: {type(error).__name__}: {error}")
        return
    seconds = time.perf_counter() - start
    wrong = [name for name, error in errors.items() if error > 1]
    if not wrong:
        report.line(label, f"{dtype:9} ok, {seconds:.2f} s")
    else:
        first = wrong[0]  # the others may be its consequences: gradients are made of the output
        report.problem(
            label,
            f"{dtype}: {first} is wrong: its error is {errors[first]:.3g} times what is allowed. "
            f"This is a fault of cuneigh, of the driver or of the device; remove the compiled "
            f"kernels in {_jit.default_directory()} and report it if it stays",
        )


# The self-test


WINDOW = Window(kernel_size=(3, 4), stride=(1, 1), dilation=(2, 1), is_causal=(False, False))


def _problem(dtype: str) -> Problem:
    """A small problem with something of everything: borders, dilation, grouped heads, extras."""
    tokens, head_dim, value_dim, additional = (7, 9), 8, 16, 3
    return attention_problem(
        "doctor",
        "forward",
        Spec((2, *tokens, 4, head_dim), dtype),
        Spec((2, *tokens, 2, head_dim), dtype),
        Spec((2, *tokens, 2, value_dim), dtype),
        WINDOW,
        None,
        Spec((2, additional, 2, head_dim), dtype),
        Spec((2, additional, 2, value_dim), dtype),
        Spec((4, *(2 * size - 1 for size in WINDOW.kernel_size)), dtype),
    )


def _case(backend: Backend, device: Device, dtype: str) -> tuple[Problem, str | None]:
    """The problem to test `backend` with, and why it cannot run that: without rpb if it must be."""
    everything = _problem(dtype)
    for problem in (everything, replace(everything, rpb_dtype=None)):
        both = (problem, replace(problem, operation="backward"))
        reason = next(filter(None, (backend.unsupported(one, device) for one in both)), None)
        if reason is None:
            break
    return problem, reason


def _errors(backend: str, device: Device, problem: Problem) -> dict[str, float]:
    """Of every result, its largest error as a share of what is allowed.

    The allowed error is sqrt(eps) of the largest expected number: half of the dtype's digits must
    be right, which no wrong neighbor and no wrong weight survives. The tests are much stricter.
    """
    generator = np.random.default_rng(0)

    def random(spec: Spec) -> Any:
        return generator.standard_normal(spec.shape).astype(_numpy_dtype(spec.dtype))

    operands = Operands(*(spec and random(spec) for spec in problem.specs))
    grad_output = random(problem.output)
    expected = dict(zip(("output", "lse"), reference.forward(problem, operands), strict=True))
    gradients = reference.backward(problem, operands, grad_output)
    expected |= {
        f"gradient of {name}": array
        for name, array in gradients._asdict().items()
        if array is not None
    }

    got = _results(backend, device, operands, grad_output)
    errors = {}
    for name, right in expected.items():
        allowed = math.sqrt(ml_dtypes.finfo(got[name].dtype).eps) * np.abs(right).max()
        error = np.abs(got[name].astype(np.float64) - right).max()
        errors[name] = float(error / allowed) if np.isfinite(error) else math.inf
    return errors


def _results(backend: str, device: Device, operands: Operands, grad_output: Any) -> dict[str, Any]:
    """What the public functions return for NumPy arrays that are sent to `device` and back."""
    if device.kind == "cpu":
        return _call(np, backend, operands, grad_output)
    import cupy

    with cupy.cuda.Device(device.index):
        results = _call(cupy, backend, operands, grad_output)
        return {name: cupy.asnumpy(array) for name, array in results.items()}


def _call(xp: Any, backend: str, operands: Operands, grad_output: Any) -> dict[str, Any]:
    query, key, value, additional_keys, additional_values, rpb, _ = (
        None if operand is None else xp.asarray(operand) for operand in operands
    )
    options = {
        **WINDOW._asdict(),
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "rpb": rpb,
        "backend": backend,
    }
    output, lse = cuneigh.na2d(query, key, value, return_lse=True, **options)
    gradients = cuneigh.na2d_backward(
        xp.asarray(grad_output), query, key, value, output, lse, **options
    )
    named = {
        f"gradient of {name}": array
        for name, array in gradients._asdict().items()
        if array is not None
    }
    return {"output": output, "lse": lse, **named}


def _numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name
