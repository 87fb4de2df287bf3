"""Random problems through the Hopper kernels, each watched: a hang is named and ended.

python tests/helpers/soak.py [--problems N] [--seconds S] [--seed SEED] [--jobs J]

The problems run in `J` child processes side by side, each of which is killed when a problem takes
longer than `LIMIT`, and started anew. Results are compared with those of the naive kernels. The
exit status says whether all of them agreed in time.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.accuracy import run_backend
from helpers.gpu_arrays import NATIVE
from helpers.hopper import COMPILED_DIMS, assert_agree, plans, supported
from helpers.strategies import inputs

from cuneigh import _device, _jit
from cuneigh._backends import hopper, naive
from cuneigh._backends.hopper import launch
from cuneigh._backends.hopper.plan import HopperPlan, ways
from cuneigh._gpu.passes import Pass
from cuneigh._problem import Problem
from cuneigh._window import Axis

LIMIT, LIMIT_OF_PREPARATION = 10.0, 120.0
"""Seconds that the kernels may take for a problem, and all that comes before it."""
MOST_ELEMENTS = 2_000_000
"""Of the output."""
READY = "ready"


class Case(NamedTuple):
    problem: Problem
    plans: dict[Pass, HopperPlan] | None
    """None for those of the backend."""
    layout: str
    seed: int
    """Of the numbers."""


@st.composite
def cases(draw) -> Case:
    # A backward is given the output of the oracle, which takes its time.
    ordinary = draw(st.booleans())  # or parts of a layout, with any borders
    large = supported(most_tokens=3000, multiplications=1_000_000_000, ordinary=ordinary)
    problem = draw(large | supported(("backward",), ordinary=ordinary))
    assume(np.prod(problem.output.shape) <= MOST_ELEMENTS)
    way = draw(st.sampled_from(ways(problem)))
    chosen = {pass_: draw(st.sampled_from(plans(problem, pass_))) for pass_ in way}
    plan = draw(st.sampled_from([None, chosen]))
    layout = draw(st.sampled_from(["contiguous", "packed", "heads_first"]))
    return Case(problem, plan, layout, draw(st.integers(0, 2**32 - 1)))


def compile_all() -> int:
    """Compile the kernels of all cases, so that no case has to wait for one."""
    device = _device.of_capability(hopper.CAPABILITY)
    kernels = set()
    for operation, rank, dtype, dims, dilation, additional, scale in itertools.product(
        hopper.LONGEST, (1, 2, 3), hopper.DTYPES, COMPILED_DIMS, (1, 2), (None, 1), (1.0, -1.0)
    ):
        part = Axis(8, 8, 2, 1, dilation, False, "cut", layout=10)
        for axis, has_mask in (
            (Axis(8, 8, 2, 1, dilation, False), False),
            (part, False),
            (part, True),
        ):
            axes = (axis,) * rank
            problem = Problem(
                operation, dtype, 1, 1, 1, *dims, axes, scale, additional, has_key_mask=has_mask
            )
            if hopper.unsupported(problem, device) is None:
                for backend in (naive, hopper):
                    kernels.update(backend.kernels(problem, device))
    _jit.precompile(kernels, ["sm_90a"])
    return len(kernels)


# The child


def planned(
    plans: dict[Pass, HopperPlan], problem: Problem, device: _device.Device, pass_: Pass
) -> HopperPlan:
    """Instead of the plan that the backend would make."""
    return plans[pass_]


def taken(way: tuple[Pass, ...], problem: Problem, device: _device.Device) -> tuple[Pass, ...]:
    """Instead of the passes that the backend would choose."""
    return way


def work(connection: Connection) -> None:
    """Compute cases as they come: say `READY` before the kernel runs and what is wrong after it."""
    device = _device.cuda(0)
    while True:
        case = connection.recv()
        given_inputs = inputs(case.problem, np.random.default_rng(case.seed), case.layout)
        given_inputs = given_inputs._replace(wants_lse=True)
        wanted = run_backend(naive, case.problem, given_inputs, **NATIVE)
        for kernel in hopper.kernels(case.problem, device):
            _jit.load(kernel, device)
        with pytest.MonkeyPatch.context() as patch:
            if case.plans is not None:
                patch.setattr(launch, "passes", partial(taken, tuple(case.plans)))
                patch.setattr(launch, "make_plan", partial(planned, case.plans))
            connection.send(READY)
            got = run_backend(hopper, case.problem, given_inputs, **NATIVE)
        try:
            assert_agree(case.problem, given_inputs, got, wanted)
            connection.send("")
        except AssertionError as error:
            connection.send(f"wrong: {error}")


class Child:
    """A process that computes cases, started when it is needed."""

    def __init__(self) -> None:
        self._process: Any = None

    def result_of(self, case: Case) -> str:
        """What is wrong with the results of a case; nothing if it is empty."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(case)
            for limit, hung in ((LIMIT_OF_PREPARATION, "hung before the kernel"), (LIMIT, "hung")):
                if not self._connection.poll(limit):
                    self.stop()
                    return hung
                said: str = self._connection.recv()
                if said != READY:
                    return said
        except (EOFError, OSError):  # an error of CUDA, which the child has printed
            self.stop()
            return "failed"
        raise AssertionError("the child says what is wrong after it was ready")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


# The parent


class TimeIsUp(BaseException):
    """Not an Exception, which hypothesis would take for a failure of the example."""


def drawn(count: int, number: int) -> Any:
    """A decorator: call the function with `count` cases drawn from the seed `number`."""
    chosen = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda function: seed(number)(chosen(given(case=cases())(function)))


def soak(count: int, seconds: float, number: int) -> tuple[int, list[str]]:
    """The number of cases of one seed that ran, and a line about each that went wrong."""
    child, end, done, wrong = Child(), time.monotonic() + seconds, [], []

    @drawn(count, number)
    def run(case: Case) -> None:
        if time.monotonic() > end:
            raise TimeIsUp
        told = child.result_of(case)
        done.append(told)
        if told:
            wrong.append(f"{told}: {case}")
            print(wrong[-1], flush=True)

    try:
        run()
    except TimeIsUp:
        pass
    finally:
        child.stop()
    return len(done), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Random problems through the Hopper kernels.")
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0, help="that of the first job")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    start, jobs = time.monotonic(), options.jobs
    print(f"{compile_all()} kernels in {time.monotonic() - start:.0f} s", flush=True)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        of_job = partial(soak, -(-options.problems // jobs), options.seconds)
        results = list(pool.map(of_job, range(options.seed, options.seed + jobs)))
    count = sum(done for done, _ in results)
    wrong = [line for _, lines in results for line in lines]
    hung = sum(line.startswith("hung") for line in wrong)
    seconds = time.monotonic() - start
    print(f"{count} problems in {seconds:.0f} s: {hung} hung, {len(wrong) - hung} failed or wrong")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
