"""Every GPU kernel on small shapes, for compute-sanitizer: no pool hides a stray access.

compute-sanitizer --tool memcheck python tests/helpers/small_shapes.py [NAME ..]

Names are those of backends, numbers of axes, operations and dtypes; the default is all of each.

With --compile it only compiles the kernels, side by side. With RACECHECK=1 they are compiled for
racecheck (cuda/cuneigh/barrier.cuh says what for).
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.accuracy import check_backend, run_backend
from helpers.attack_calls import architecture
from helpers.few_queries import few_queries
from helpers.few_queries import plans as plans_for_few_queries
from helpers.gpu_arrays import NATIVE
from helpers.strategies import OPERATIONS, inputs

from cuneigh import _device, _jit
from cuneigh._backends import fused, gemm, hopper, naive
from cuneigh._backends.fused import launch
from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.choice import Plan
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small import whole
from cuneigh._backends.hopper.plan import ways
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._gpu.program import Program
from cuneigh._jit import _compiler
from cuneigh._parameters import Window
from cuneigh._problem import DTYPES, Problem, Spec
from cuneigh._validate import attention_problem, av_problem, qk_problem

BACKENDS = hopper, naive, gemm, fused
WINDOWS = {
    1: ((13,), Window((5,), (2,), (2,), (True,)), Window((4,), (1,), (3,), (False,))),
    2: (
        (7, 6),
        Window((3, 2), (2, 1), (2, 1), (False, True)),
        Window((3, 4), (1, 1), (2, 1), (False, False)),
    ),
    3: (
        (3, 5, 4),
        Window((2, 3, 1), (2, 1, 1), (1, 1, 4), (True, False, False)),
        Window((3, 2, 2), (1, 1, 1), (1, 2, 1), (False, False, False)),
    ),
}


def problem_of(operation: str, dtype: str, rank: int, dims: tuple[int, int], rpb: bool) -> Problem:
    """Two elements of the batch, four query heads on two key heads, three additional keys."""
    tokens, plain, unit_stride = WINDOWS[rank]
    window = unit_stride if rpb else plain
    query = Spec((2, *tokens, 4, dims[0]), dtype)
    key, value = (Spec((2, *tokens, 2, dim), dtype) for dim in dims)
    extra_keys, extra_values = (Spec((2, 3, 2, dim), dtype) for dim in dims)
    bias = Spec((4, *(2 * k - 1 for k in window.kernel_size)), dtype) if rpb else None
    if operation[:2] == "qk":
        return qk_problem("small", operation, query, key, window, 0.5, bias, extra_keys)
    if operation[:2] == "av":
        weights = Spec((2, *tokens, 4, int(np.prod(window.kernel_size)) + 3), dtype)
        return av_problem("small", operation, weights, value, window, extra_values)
    return attention_problem(
        "small", operation, query, key, value, window, 0.5, extra_keys, extra_values, bias
    )


def plain_problem_of(operation: str, dtype: str, rank: int) -> Problem:
    """One that the GEMM backend can multiply in place."""
    query = Spec((2, *(16, 4, 2)[:rank], 2, 16), dtype)
    window = Window(*((value,) * rank for value in (2, 1, 1, False)))
    if operation[:2] == "qk":
        return qk_problem("small", operation, query, query, window, 0.5, None, None)
    if operation[:2] == "av":
        weights = Spec((*query.shape[:-1], 2**rank), dtype)
        return av_problem("small", operation, weights, query, window, None)
    return attention_problem("small", operation, query, query, query, window, 0.5)


def small_window_problems_of(operation: str, dtype: str, rank: int) -> list[Problem]:
    """Some that `fused` has kernels of their own for, with borders, dilation and a causal axis.

    One has a key mask; the gradients after it are those of whole dilation groups.
    """
    tokens = {1: (37,), 2: (11, 14), 3: (6, 5, 9)}[rank]
    causal = (False,) * (rank - 1) + (True,)
    window = Window((3,) * rank, (1,) * rank, (2, 1, 1)[:rank], causal)
    cases = [(tokens, window, 32, 64)]
    if operation == "forward":
        cases.append((tokens, window, 128, 64))
        if rank == 1:  # the largest tiles
            cases.append(((150,), Window((121,), (1,), (1,), (False,)), 64, 64))
    problems = []
    for tokens, window, head_dim, value_dim in cases:
        query, key = (Spec((3, *tokens, heads, head_dim), dtype) for heads in (4, 2))
        value = Spec((3, *tokens, 2, value_dim), dtype)
        problems.append(attention_problem("small", operation, query, key, value, window, 0.5))
    problems.append(replace(problems[0], has_key_mask=True))
    if operation == "backward":  # whole dilation groups
        array = Spec((3, *tokens, 2, 32), dtype)
        problems.append(attention_problem("small", operation, array, array, array, window, 0.5))
    return problems


def long_window_problems_of(operation: str, dtype: str, rank: int) -> list[Problem]:
    """Some for `hopper`: several tiles, masked boxes and additional keys; the second is dilated.

    Those after it have key masks. Some gradients have sums of dQ in memory.
    """
    tokens = {1: (300,), 2: (21, 22), 3: (7, 8, 9)}[rank]
    kernel_size = {1: (110,), 2: (9, 8), 3: (3, 4, 2)}[rank]
    problems = []
    cases = [(1, (64, 64)), (2, (128, 32))]
    if operation == "backward" or (operation == "jvp" and rank == 1):
        cases.append((1, (128, 80)))
    if operation != "jvp":
        cases.append((1, (192, 256)))
    for dilation, dims in cases:
        window = Window(
            kernel_size, (2,) * rank, (dilation,) * rank, (False,) * (rank - 1) + (True,)
        )
        batch = 2 if rank == 3 else 1  # the oracle takes its time
        query = Spec((batch, *tokens, 6, dims[0]), dtype)
        key, value = (Spec((batch, *tokens, 2, dim), dtype) for dim in dims)
        extra = (
            (Spec((batch, 130, 2, dim), dtype) for dim in dims) if dilation > 1 else (None, None)
        )
        scale = -0.1 if dilation > 1 else 0.1
        problems.append(
            attention_problem("small", operation, query, key, value, window, scale, *extra, None)
        )
    return problems + [replace(problem, has_key_mask=True) for problem in problems[1:]]


def few_queries_problems_of(dtype: str) -> list[Problem]:
    """Some of one axis that `fused` has kernels of their own for."""
    rng = np.random.default_rng(0)
    return [few_queries(rng, dtype, dims, 700) for dims in ((128, 128), (64, 40)) for _ in range(4)]


def choose_plan(
    kind: str,
    number: int,
    problem: Problem,
    device: _device.Device,
    pass_: Pass,
    small_windows: bool,
    few_queries: bool,
    whole_groups: bool,
) -> Plan:
    """Instead of the plan that `fused` would choose: one of the kind that is to be tested.

    The blocks of the kernels for windows of any size take several batch-heads by turns, and those
    for few queries have all forms by turns.
    """
    if kind == "few queries":
        assert few_queries
        plans = plans_for_few_queries(problem, device)
        return plans[number % len(plans)]
    if kind == "small windows":
        assert small_windows
        plan: Plan | None = None
        if whole_groups:
            plan = whole.make_plan(problem, device)
        plan = plan or small_plan.make_plan(problem, device, pass_)
        assert plan is not None
        return plan
    other = fused_plan.make_plan(problem, device, pass_)
    return replace(other, batch_heads=3 - number % 2 * 2) if pass_ == FORWARD else other


def take(way: tuple[Pass, ...], problem: Problem, device: _device.Device) -> tuple[Pass, ...]:
    """Instead of the passes that `hopper` would choose."""
    return way


def compile_all(*chosen: list[Any]) -> None:
    found: dict[_jit.Kernel, None] = {}

    def collect(program: Program, addresses: Sequence[int], stream: int) -> None:
        found.update(dict.fromkeys(program.kernels))

    Program.run = collect
    run_all(*chosen, run_backend)
    _jit.precompile(found, [architecture()])
    print(f"{len(found)} kernels compiled")


def run_all(
    names: list[str],
    ranks: list[int],
    operations: list[str],
    dtypes: list[str],
    run: Callable[..., object],
) -> int:
    """Call ``run(backend, problem, inputs, ..)`` for all of them, and return how many there are."""
    cupy.cuda.set_allocator(None)
    if os.environ.get("RACECHECK") == "1":
        _compiler.OPTIONS += ("-DCUNEIGH_ALL_LANES_ARRIVE",)
    device = _device.cuda(0)
    count = 0
    for operation, dtype, rank in itertools.product(operations, dtypes, ranks):
        cases = [(problem_of(operation, dtype, rank, (7, 520), False), "packed")]
        cases.append((plain_problem_of(operation, dtype, rank), "contiguous"))
        small: list[Problem] = []
        long: list[Problem] = []
        few: list[Problem] = []
        if (operation, rank) == ("forward", 1) and DTYPES[dtype] == 2:
            few = few_queries_problems_of(dtype) if device.capability >= (8, 0) else []
            cases += [(problem, "contiguous") for problem in few]
        if operation in ("forward", "backward", "jvp", "hvp"):
            for rpb in (False, True):
                cases.append((problem_of(operation, dtype, rank, (130, 250), rpb), "packed"))
            if DTYPES[dtype] == 2:
                small = small_window_problems_of(operation, dtype, rank)
                cases += [(problem, "contiguous") for problem in small]
            if DTYPES[dtype] == 2 and operation in hopper.LONGEST:
                long = long_window_problems_of(operation, dtype, rank)
                cases += [(problem, "heads_first") for problem in long]
        if operation[:2] != "av":
            cases.append((problem_of(operation, dtype, rank, (32, 32), True), "contiguous"))
        for problem, layout in cases:
            given = inputs(problem, np.random.default_rng(rank), layout)
            kind = "small windows" if problem in small else "few queries" if problem in few else ""
            launch.choose_plan = partial(choose_plan, kind, count)
            only = {"few queries": (hopper, fused)}.get(kind, BACKENDS)
            for backend in (hopper,) if problem in long else only:
                if backend.NAME not in names or backend.unsupported(problem, device) is not None:
                    continue
                for way in ways(problem) if backend is hopper else [()]:
                    hopper.launch.passes = partial(take, way)
                    run(backend, problem, given, **NATIVE)
                    count += 1
    return count


if __name__ == "__main__":
    given = sys.argv[1:]
    names = [one.NAME for one in BACKENDS if one.NAME in given] or [one.NAME for one in BACKENDS]
    ranks = [rank for rank in WINDOWS if str(rank) in given] or list(WINDOWS)
    every = [*OPERATIONS, "jvp", "hvp"]
    operations = [each for each in every if each in given] or every
    dtypes = [dtype for dtype in DTYPES if dtype in given] or list(DTYPES)
    if "--compile" in given:
        compile_all(names, ranks, operations, dtypes)
    else:
        count = run_all(names, ranks, operations, dtypes, check_backend)
        print(f"{count} results agree with the oracle")
