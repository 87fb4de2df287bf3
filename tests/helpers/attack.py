"""An attack on the GPU backends through the public functions; a script.

python tests/helpers/attack.py [--seconds S] [--problems N] [--seed SEED] [--device cpu]

First every kernel that the random problems need is compiled, on all processors. Then they run, and
after them arrays of no elements, numbers that are not finite, arrays beyond 2^31 elements, threads
with a stream each, memory that runs out, and a cache that another process has filled. The random
problems get what is left of the seconds. What `soak` does, problems that may hang, is not repeated.

With ``--device cpu`` the same is done to the cpu backend as far as it can be. The exit status says
whether nothing was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import gpu_arrays
from helpers.calls import results_of
from helpers.dense import Dense, mask, wrong
from helpers.illegal import call_of
from helpers.strategies import LAYOUTS, OPERATIONS, Inputs, array, inputs

import cuneigh
from cuneigh import _call, _device, _jit
from cuneigh._backends import BACKENDS
from cuneigh._problem import Problem, Spec
from cuneigh._validate import Window, attention_problem, av_problem, qk_problem

MOST_KERNELS = 450
CHUNK = 50
"""Problems that a process takes at a time."""
LIMIT = 60.0
"""Seconds after which a chunk counts as hung."""


class Family(NamedTuple):
    """What a kernel depends on, apart from the operation."""

    dtype: str
    rank: int
    head_dim: int
    value_dim: int
    additional: bool
    rpb: str | None
    dilated: bool


FAMILIES = (
    Family("float16", 1, 64, 64, True, None, False),
    Family("float16", 2, 32, 32, False, "float16", False),
    Family("float16", 3, 40, 24, True, "float32", True),
    Family("bfloat16", 1, 128, 64, False, None, True),
    Family("bfloat16", 2, 64, 64, True, None, False),
    Family("bfloat16", 2, 32, 32, False, None, True),
    Family("float32", 1, 20, 36, True, "float32", False),
    Family("float32", 2, 64, 64, False, None, True),
    Family("float32", 3, 7, 5, False, "float32", False),
    Family("float64", 2, 16, 8, True, "float64", True),
)


# Random problems: the same ones in every process, by their seeds


def problem_of(rng: np.random.Generator) -> Problem:
    family = FAMILIES[rng.integers(len(FAMILIES))]
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    has_rpb = family.rpb is not None and operation[:2] != "av"
    longest = {1: 160, 2: 14, 3: 6}[family.rank]
    tokens = tuple(int(n) for n in rng.integers(1, longest + 1, family.rank))
    axes = []
    for length in tokens:
        kernel_size = int(rng.integers(1, rng.choice([min(8, length), length]) + 1))
        dilation = int(rng.integers(1, length // kernel_size + 1)) if family.dilated else 1
        stride = 1 if has_rpb else int(rng.integers(1, kernel_size + 1))
        axes.append((kernel_size, stride, dilation, bool(not has_rpb and rng.random() < 0.4)))
    window = Window(*zip(*axes, strict=True))
    batch, kv_heads, group = (int(n) for n in rng.integers(1, 4, 3))
    query = Spec((batch, *tokens, kv_heads * group, family.head_dim), family.dtype)
    key = Spec((batch, *tokens, kv_heads, family.head_dim), family.dtype)
    value = Spec((batch, *tokens, kv_heads, family.value_dim), family.dtype)
    extra_keys = extra_values = rpb = None
    if family.additional:
        count = int(rng.integers(0, 6))
        extra_keys = Spec((batch, count, kv_heads, family.head_dim), family.dtype)
        extra_values = Spec((batch, count, kv_heads, family.value_dim), family.dtype)
    if has_rpb:
        shape = (kv_heads * group, *(2 * k - 1 for k in window.kernel_size))
        rpb = Spec(shape, str(family.rpb))
    scale = float(rng.choice([family.head_dim**-0.5, 0.3]))
    if operation[:2] == "qk":
        return qk_problem("attack", operation, query, key, window, scale, rpb, extra_keys)
    if operation[:2] == "av":
        slots = int(np.prod(window.kernel_size)) + (
            0 if extra_keys is None else extra_keys.shape[1]
        )
        weights = Spec((*query.shape[:-1], slots), family.dtype)
        return av_problem("attack", operation, weights, value, window, extra_values)
    extra = extra_keys, extra_values
    return attention_problem("attack", operation, query, key, value, window, scale, *extra, rpb)


class Case(NamedTuple):
    problem: Problem
    layout: str
    given: dict[str, np.ndarray]
    """The arrays of the call by name."""


@functools.lru_cache(maxsize=CHUNK)
def case_of(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    problem, layout = problem_of(rng), str(rng.choice(LAYOUTS))
    return Case(problem, layout, arrays_of(problem, inputs(problem, rng, layout), rng))


def arrays_of(problem: Problem, drawn: Inputs, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the call of a problem is given, but for output and lse, which it gets from a forward."""
    named = drawn.operands._asdict() | drawn._asdict()
    return {
        name: named[name]
        for name in call_of(problem).arguments
        if isinstance(named.get(name), np.ndarray)
    }


# Calls


def xp_of(device: str) -> Any:
    if device == "cpu":
        return np
    import cupy

    return cupy


def native(array: np.ndarray, device: str) -> Any:
    return array if device == "cpu" else gpu_arrays.to_cupy(array)


def backends(problem: Problem, device: str) -> list[str]:
    where = _device.CPU if device == "cpu" else _device.cuda(0)
    return [each.NAME for each in BACKENDS if each.unsupported(problem, where) is None]


def call(problem: Problem, arrays: dict[str, Any], backend: str) -> dict[str, Any]:
    """The results of the public function, by name; RuntimeError if these strides are refused."""
    made = call_of(problem)
    arguments = {
        name: arrays.get(name) if isinstance(value, Spec) else value
        for name, value in made.arguments.items()
    }
    if problem.operation == "forward":
        arguments["return_lse"] = True
    return results_of(problem, getattr(cuneigh, made.function)(**arguments, backend=backend))


def with_forward(problem: Problem, arrays: dict[str, Any], device: str, xp: Any) -> dict[str, Any]:
    """For a backward: the output and lse of the oracle, in the precision of the problem."""
    if problem.operation != "backward":
        return arrays
    forward = replace(problem, operation="forward")
    results = Dense(forward, arrays, xp).run()
    output, lse = results["output"].expected, results["lse"].expected
    dtype = arrays["query"].dtype
    accumulator = xp.float64 if problem.accumulator == "float64" else xp.float32
    return arrays | {"output": output.astype(dtype), "lse": lse.astype(accumulator)}


def kernels_of(seed: int) -> set[_jit.Kernel]:
    """What the calls of a case load, found by planning them."""
    case, found = case_of(seed), set()

    def load(kernel: _jit.Kernel, device: Any) -> Any:
        found.add(kernel)
        function = mock.MagicMock(max_dynamic_shared_size_bytes=1 << 30)
        function.kernel.ptr = 0
        return function

    arrays = case.given | {
        name: np.empty(*spec)
        for name, spec in (("output", case.problem.output), ("lse", case.problem.lse))
        if case.problem.operation == "backward"
    }
    layouts = tuple(
        (tuple(n // each.itemsize for n in each.strides), _offset(each) % 16)
        for each in arrays.values()
    )
    with mock.patch.object(_jit, "load", load):
        for backend in backends(case.problem, "cuda"):
            with contextlib.suppress(RuntimeError):  # these strides are refused
                _call.program_for.__wrapped__(
                    None, case.problem, 0, backend, tuple(arrays), case.problem.results, layouts
                )
    return found


def _offset(array: np.ndarray) -> int:
    """Of the first element from the lowest one in memory, which CuPy aligns."""
    low, _ = np.lib.array_utils.byte_bounds(array)
    return array.__array_interface__["data"][0] - low


def collect(seeds: range) -> list[tuple[int, set[_jit.Kernel]]]:
    return [(seed, kernels_of(seed)) for seed in seeds]


def attack_cases(seeds: list[int], device: str, end: float) -> tuple[Counter[str], list[str]]:
    """Compare cases with the oracle until the time is up: how many by backend, and what is wrong."""
    xp, counts, lines = xp_of(device), Counter(), []
    for seed in seeds:
        if time.time() > end:
            break
        case = case_of(seed)
        arrays = {name: native(each, device) for name, each in case.given.items()}
        arrays = with_forward(case.problem, arrays, device, xp)
        expected = Dense(case.problem, arrays, xp).run()
        for backend in backends(case.problem, device):
            where = f"seed {seed}, {backend}, {case.layout}: {case.problem}"
            try:
                got = call(case.problem, arrays, backend)
            except RuntimeError as error:
                if "no backend" in str(error):
                    counts["refused for its strides"] += 1
                else:
                    lines.append(f"{where}: {error}")
                continue
            counts[backend] += 1
            for name, result in expected.items():
                told = wrong(got[name], result, xp)
                if told:
                    lines.append(f"{where}: {name}: {told}")
    return counts, lines


def random_problems(options: argparse.Namespace, end: float) -> Iterator[str]:
    jobs = options.jobs
    context = multiprocessing.get_context("spawn")
    start = time.time()
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        seeds = range(options.seed * 10**6, options.seed * 10**6 + options.problems)
        chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
        chosen = [list(chunk) for chunk in chunks]
        if options.device != "cpu":
            uses = [pair for found in pool.map(collect, chunks) for pair in found]
            ranked = Counter(kernel for _, kernels in uses for kernel in kernels)
            kept = {kernel for kernel, _ in ranked.most_common(MOST_KERNELS)}
            fitting = [seed for seed, kernels in uses if kernels <= kept]
            print(f"planned in {time.time() - start:.0f} s", flush=True)
            _jit.precompile(kept, [architecture()])
            yield f"!{len(kept)} kernels compiled, {time.time() - start:.0f} s with the planning"
            chosen = [fitting[i : i + CHUNK] for i in range(0, len(fitting), CHUNK)]
        futures = [pool.submit(attack_cases, chunk, options.device, end) for chunk in chosen]
        counts: Counter[str] = Counter()
        for future in futures:
            found, lines = future.result(max(end - time.time(), 0) + LIMIT)
            counts += found
            yield from lines
    total = sum(count for name, count in counts.items() if name != "refused for its strides")
    yield f"!{total} comparisons: " + ", ".join(f"{n} {name}" for name, n in counts.items())


def architecture() -> str:
    """The one that this GPU's kernels are compiled for."""
    own, _ = _jit._load.architectures_of(_device.cuda(0))
    return own[0]


# The other attacks; each gives lines about what is wrong, and with "!" before them what was done


def plain(dtype: str, tokens: tuple[int, ...], kernel_size: int, operation: str = "forward") -> Any:
    """A problem of one key head, and its arrays."""
    spec = Spec((1, *tokens, 2, 64), dtype)
    sizes = (kernel_size,) * len(tokens)
    ones, flags = (1,) * len(tokens), (False,) * len(tokens)
    window = Window(sizes, ones, ones, flags)
    return attention_problem("attack", operation, spec, spec, spec, window, None)


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
    for dtype, tokens in itertools.product(("float16", "bfloat16", "float32"), ((200,), (20, 18))):
        problem = plain(dtype, tokens, 7)
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
    problems = [plain(dtype, (300,), 33) for dtype in ("float16", "float32")]
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
                pool.set_limit(size=pool.total_bytes() + (megabytes << 20) + 1)
                try:
                    call(problem, arrays, backend)
                except cupy.cuda.memory.OutOfMemoryError:
                    failed += 1
                finally:
                    pool.set_limit(size=0)
                for name, result in call(problem, arrays, backend).items():
                    if not bool((result == expected[name]).all()):
                        yield f"{backend}, {dtype}: {name} differs after memory ran out"
            if not failed:
                yield f"{backend}, {dtype}: memory never ran out"
            yield f"!{backend}, {dtype}: {failed} times"


def foreign_cache(device: str) -> Iterator[str]:
    """A cache that a machine without this driver has filled is used as it is."""
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
            "for backend in ('naive', 'fused', 'gemm'):\n"
            "    assert (cuneigh.na1d(x, x, x, 9, backend=backend) == 1).all(), backend\n"
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

FOR_OTHERS = 45.0
"""Seconds that all attacks but the random problems take, roughly."""


def main() -> int:
    parser = argparse.ArgumentParser(description="An attack on the GPU backends.")
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    start = time.time()
    found = 0
    attacks = [(attack.__name__, attack(options.device)) for attack in ATTACKS]
    end = start + options.seconds - FOR_OTHERS * (options.device != "cpu")
    for name, lines in [("random_problems", random_problems(options, end)), *attacks]:
        begun, shown = time.time(), []
        try:
            for line in lines:
                if line.startswith("!"):
                    shown.append(line[1:])
                else:
                    found += 1
                    print(f"WRONG {name}: {line}", flush=True)
        except Exception as error:
            found += 1
            print(f"WRONG {name}: {type(error).__name__}: {error}", flush=True)
        print(f"{name} ({time.time() - begun:.0f} s): {'; '.join(shown)}", flush=True)
    print(f"{time.time() - start:.0f} s: {found} wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
