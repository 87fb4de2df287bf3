"""What is hard for a backend, beside random problems: the other attacks of `attack`.

Each gives lines: about what is wrong, or, with "!" before them, about what was done.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers.attack_calls import architecture, backends, call, native, with_forward, xp_of
from helpers.dense import Dense, mask, wrong
from helpers.strategies import array

import cuneigh
from cuneigh import _device, _jit
from cuneigh._backends import BACKENDS
from cuneigh._parameters import Window
from cuneigh._problem import Spec
from cuneigh._validate import attention_problem


def plain(dtype: str, tokens: tuple[int, ...], kernel_size: int, operation: str = "forward") -> Any:
    """A problem of one key head, and its arrays."""
    spec = Spec((1, *tokens, 2, 64), dtype)
    sizes = (kernel_size,) * len(tokens)
    ones, flags = (1,) * len(tokens), (False,) * len(tokens)
    window = Window(sizes, ones, ones, flags)
    return attention_problem("attack", operation, spec, spec, spec, window, None)


SMALL = ("float16", "bfloat16", "float32"), ((200,), (20, 18)), 7
"""Dtypes, tokens and window of problems with numbers that are not finite."""
LONG = ("float16", "float32"), (300,), 33
"""Of those that several threads compute."""


def kernels() -> set[_jit.Kernel]:
    """Of the problems below, to be compiled beforehand."""
    problems = [
        plain(dtype, tokens, SMALL[2]) for dtype, tokens in itertools.product(*SMALL[:2])
    ] + [
        plain(dtype, *LONG[1:], operation)
        for dtype, operation in itertools.product(LONG[0], ("forward", "backward"))
    ]
    device = _device.cuda(0)
    return {
        kernel
        for problem in problems
        for backend in BACKENDS
        if backend.unsupported(problem, device) is None
        for kernel in backend.kernels(problem, device)
    }


def no_elements(device: str) -> Iterator[str]:
    """Sizes of 0 and 1."""
    xp, count = xp_of(device), 0
    for dtype, shape in itertools.product(
        ("float16", "float32", "float64"),
        ((0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16), (1, 1, 1, 1), (0, 0, 0, 1)),
    ):
        given = xp.ones(shape, dtype)
        output, lse = cuneigh.na1d(given, given, given, min(shape[1], 3) or 3, return_lse=True)
        backward = cuneigh.na1d_backward(
            output, given, given, given, output, lse, min(shape[1], 3) or 3
        )
        for result in (output, *backward[:3]):
            if result.shape != shape or not bool(xp.isfinite(result).all()):
                yield f"shape {shape} of {dtype}: a result of shape {result.shape}"
        count += 1
    yield f"!{count} shapes"


def not_finite(device: str) -> Iterator[str]:
    """A key (or value, with backends that promise it) reaches only the queries that see it."""
    xp, count = xp_of(device), 0
    for dtype, tokens in itertools.product(*SMALL[:2]):
        problem = plain(dtype, tokens, SMALL[2])
        rng = np.random.default_rng(0)
        names = ("query", "key", "value")
        host = {name: array(problem.specs.query, rng) for name in names}
        for backend, poison in itertools.product(
            backends(problem, device), (np.nan, np.inf, -np.inf)
        ):
            clean = {name: native(each, device) for name, each in host.items()}
            before = call(problem, clean, backend)["output"]
            for name in ("key", "value") if backend in ("naive", "cpu") else ("key",):
                token = int(rng.integers(np.prod(tokens)))
                changed = host[name].copy()
                changed.reshape(-1, 2, 64)[token] = poison
                after = call(problem, clean | {name: native(changed, device)}, backend)["output"]
                blind = xp.asarray(~mask(problem)[:, token])
                rows = [each.astype("float32").reshape(-1, 2 * 64) for each in (before, after)]
                if not bool((rows[0][blind] == rows[1][blind]).all()):
                    yield f"{backend}, {dtype}, {tokens}: {poison} in {name} {token} goes too far"
                if np.isnan(poison) and not bool(xp.isnan(rows[1][~blind]).all()):
                    yield f"{backend}, {dtype}, {tokens}: NaN in {name} {token} is lost"
                count += 1
    yield f"!{count} calls"


def huge(device: str) -> Iterator[str]:
    """Packed, transposed and reversed arrays of more than 2^31 elements: both of their ends."""
    if device == "cpu":
        return
    import cupy as xp

    heads, dim, window, near = 8, 64, 9, 64
    count = (1 << 31) // (3 * heads * dim) + 5000
    memory = xp.empty((1, count, 3, heads, dim), "float16")
    for start in range(0, count, 1 << 16):
        part = memory[:, start : start + (1 << 16)]
        part[...] = xp.random.standard_normal(part.shape, dtype="float32")
    for layout in ("packed", "reversed"):
        given = [memory[:, :: -1 if layout == "reversed" else 1, i] for i in range(3)]
        problem = attention_problem(
            "attack", "forward", *(Spec(each.shape, "float16") for each in given),
            Window((window,), (1,), (1,), (False,)), None,
        )  # fmt: skip
        small = plain("float16", (near,), window)
        small = replace(small, heads=heads, kv_heads=heads)
        for backend in backends(problem, device):
            try:
                output = cuneigh.na1d(*given, window, backend=backend)
            except RuntimeError as error:
                yield f"!{backend} refuses {layout}: {str(error)[:150]}"
                continue
            for end in (slice(0, near), slice(count - near, count)):
                cut = dict(zip(("query", "key", "value"), (x[:, end] for x in given), strict=True))
                result = Dense(small, cut, xp).run()["output"]
                inner = slice(0, near - window) if end.start == 0 else slice(window, None)
                result = result._replace(expected=result.expected[:, inner])
                told = wrong(output[:, end][:, inner], result, xp)
                if told:
                    yield f"{backend}, {layout}, {end}: {told}"
            yield f"!{backend}, {layout}: {memory.size:,} elements"
            del output
            xp.get_default_memory_pool().free_all_blocks()


def streams(device: str) -> Iterator[str]:
    """Eight threads with a stream each get the bits that one gets alone."""
    problems = [plain(dtype, *LONG[1:]) for dtype in LONG[0]]
    problems += [replace(problem, operation="backward") for problem in problems]
    rng = np.random.default_rng(0)
    jobs = []
    for problem in problems:
        host = {name: array(problem.specs.query, rng) for name in ("query", "key", "value")}
        if problem.operation == "backward":
            host["grad_output"] = array(problem.output, rng)
        arrays = {name: native(each, device) for name, each in host.items()}
        arrays = with_forward(problem, arrays, device, xp_of(device))
        for backend in backends(problem, device):
            jobs.append((problem, arrays, backend, call(problem, arrays, backend)))
    lines: list[str] = []

    def work(number: int) -> None:
        xp = xp_of(device)
        stream = xp.cuda.Stream(non_blocking=True) if device != "cpu" else contextlib.nullcontext()
        with stream:
            for i in range(40):
                problem, arrays, backend, expected = jobs[(number + i) % len(jobs)]
                for name, result in call(problem, arrays, backend).items():
                    if not bool((result == expected[name]).all()):
                        lines.append(f"thread {number}: {backend}, {name} of {problem}")

    if device != "cpu":
        xp_of(device).cuda.Device().synchronize()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from lines
    yield f"!{8 * 40} calls of {len(jobs)} kinds"


def out_of_memory(device: str) -> Iterator[str]:
    """Memory runs out at different points of a call; the next call works."""
    if device == "cpu":
        return
    import cupy

    pool = cupy.get_default_memory_pool()
    for dtype in ("float16", "float32"):
        problem = plain(dtype, (16384,), 65, "backward")
        rng = np.random.default_rng(0)
        host = {
            name: array(problem.output, rng) for name in ("query", "key", "value", "grad_output")
        }
        given = {name: native(each, device) for name, each in host.items()}
        forward = replace(problem, operation="forward")
        for backend in backends(problem, device):
            arrays = given | call(forward, given, backend)
            expected, failed = call(problem, arrays, backend), 0
            for megabytes in (0, 1, 2, 4, 6, 8, 10, 16, 64):
                pool.free_all_blocks()
                pool.set_limit(size=pool.total_bytes())
                held = everything_free(pool)
                pool.set_limit(size=pool.total_bytes() + (megabytes << 20) + 1)
                try:
                    call(problem, arrays, backend)
                except cupy.cuda.memory.OutOfMemoryError:
                    failed += 1
                finally:
                    pool.set_limit(size=0)
                held.clear()
                for name, result in call(problem, arrays, backend).items():
                    if not bool((result == expected[name]).all()):
                        yield f"{backend}, {dtype}: {name} differs after memory ran out"
            if not failed:
                yield f"{backend}, {dtype}: memory never ran out"
            yield f"!{backend}, {dtype}: {failed} times"


def everything_free(pool: Any) -> list[Any]:
    """The memory that a pool at its limit can still give, in parts of arrays that are in use."""
    from cupy.cuda.memory import OutOfMemoryError

    held: list[Any] = []
    for bits in range(30, 8, -1):
        with contextlib.suppress(OutOfMemoryError):
            while True:
                held.append(pool.malloc(1 << bits))
    return held


def foreign_cache(device: str) -> Iterator[str]:
    """A cache that a machine without this driver has filled is used as it is.

    Which kernels `gemm` takes depends on the sizes, which nobody knows beforehand.
    """
    if device == "cpu":
        return
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"CUNEIGH_CACHE_DIR": directory}
        fill = [sys.executable, "-m", "cuneigh", "compile", "--arch", architecture(), "--rank", "1",
                "--dtype", "float16", "--head-dim", "64", "--operation", "forward"]  # fmt: skip
        hidden = environment | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(fill, env=hidden, check=True, capture_output=True)
        before = _jit.Cache(Path(directory)).contents()
        script = (
            "import cupy, cuneigh\n"
            "x = cupy.ones((1, 256, 2, 64), 'float16')\n"
            "for backend in ('naive', 'fused'):\n"
            "    output = cuneigh.na1d(x, x, x, 9, backend=backend)\n"
            "    assert (abs(output - 1) < 1e-2).all(), backend\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            yield f"calls with it fail: {done.stderr[-500:]}"
        if _jit.Cache(Path(directory)).contents() != before:
            yield "a kernel was compiled again"
        yield f"!{before[0]} kernels"


def free_threads(device: str) -> Iterator[str]:
    enabled = getattr(sys, "_is_gil_enabled", lambda: True)()
    told = (
        "not tried: this Python has the GIL" if enabled else "all of the above ran without the GIL"
    )
    yield f"!{told}"


ATTACKS: tuple[Callable[[str], Iterator[str]], ...] = (
    no_elements,
    not_finite,
    huge,
    streams,
    out_of_memory,
    foreign_cache,
    free_threads,
)
