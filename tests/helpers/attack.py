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
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import attack_hard, part_problems
from helpers.attack_calls import architecture, backends, call, native, with_forward, xp_of
from helpers.dense import Dense, wrong
from helpers.illegal import call_of
from helpers.strategies import LAYOUTS, OPERATIONS, Inputs, inputs

from cuneigh import _jit, _programs
from cuneigh._parameters import Window
from cuneigh._problem import Problem, Spec
from cuneigh._validate import attention_problem, av_problem, qk_problem

MOST_KERNELS = 500
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
"""Of problems with whole layouts; those of parts, borders and masks have families of their own."""


# Random problems: the same ones in every process, by their seeds


def problem_of(rng: np.random.Generator) -> Problem:
    families = (*FAMILIES, *part_problems.FAMILIES)
    family = families[rng.integers(len(families))]
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    if isinstance(family, part_problems.Family):
        has_mask = bool(rng.random() < 0.5)
        return part_problems.part_problem(rng, family, operation, has_mask)
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


def kernels_of(seed: int) -> set[_jit.Kernel]:
    """What the calls of a case load, found by planning them."""
    case, found = case_of(seed), set()
    arrays = case.given | {
        name: np.empty(*spec)
        for name, spec in (("output", case.problem.output), ("lse", case.problem.lse))
        if case.problem.operation == "backward"
    }
    layouts = tuple(
        (tuple(n // each.itemsize for n in each.strides), _offset(each) % 16)
        for each in arrays.values()
    )
    for backend in backends(case.problem, "cuda"):
        with contextlib.suppress(RuntimeError):  # these strides are refused
            program = _programs.program_for.__wrapped__(
                None, case.problem, 0, backend, tuple(arrays), case.problem.results, layouts
            )
            found.update(program.kernels)
    return found


def _offset(array: np.ndarray) -> int:
    """Of the first element from the lowest one in memory, which CuPy aligns."""
    low, _ = np.lib.array_utils.byte_bounds(array)
    return array.__array_interface__["data"][0] - low


def collect(seeds: range) -> list[tuple[int, set[_jit.Kernel]]]:
    return [(seed, kernels_of(seed)) for seed in seeds]


def attack_cases(seeds: list[int], device: str, end: float) -> tuple[Counter[str], list[str]]:
    """Compare cases with the oracle until `end`: how many by backend, and what is wrong."""
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
            _jit.precompile(kept | attack_hard.kernels(), [architecture()])
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


FOR_OTHERS = 45.0
"""Seconds that all attacks but the random problems take, roughly."""


def main() -> int:
    parser = argparse.ArgumentParser(description="An attack on the GPU backends.")
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--random-only", action="store_true", help="no attack but random problems")
    options = parser.parse_args()
    start = time.time()
    found = 0
    others = () if options.random_only else attack_hard.ATTACKS
    attacks = [(attack.__name__, attack(options.device)) for attack in others]
    end = start + options.seconds - FOR_OTHERS * (options.device != "cpu" and bool(others))
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
