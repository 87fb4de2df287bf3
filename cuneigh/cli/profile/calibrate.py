"""`profile --calibrate`: the cost models of the planners fitted to the GPU at hand.

Problems of all kinds are measured, with every backend that is not far slower and with several of
its plans. For each backend those rates are found that explain its times (`_measure.fit`), kept, and
taken by later calls.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

from cuneigh import _backends, _call, _jit
from cuneigh._backends import Backend
from cuneigh._device import Device
from cuneigh._gpu import rates
from cuneigh._gpu.announce import describe
from cuneigh._gpu.linear import leaves
from cuneigh._gpu.program import Program
from cuneigh._measure.cases import problem_of
from cuneigh._measure.fit import Measured, fit, root_mean_square
from cuneigh._measure.trials import Arguments, Trials
from cuneigh._problem import Problem
from cuneigh._progress import counting
from cuneigh.cli.profile.document import Row

SECONDS = 230.0
"""After which no more calls are measured."""
BUDGET_MS = 12.0
"""Of repeated calls, for each time."""
TOGETHER = 32
"""Calls whose kernels are compiled together."""
FAR_SLOWER = 8.0
"""How often longer than the fastest a backend is predicted to take that is not measured."""
ALTERNATIVES = 3
"""Plans of a pass that are measured beside the planner's."""
FEWEST = 4
"""Measured calls of a backend below which its rates are left as they are."""

CASES: tuple[dict[str, Any], ...] = (
    # Long windows, which are multiplications first of all
    {"dtype": "bfloat16", "tokens": [16384], "heads": 8, "dim": 128, "kernel": 2048},
    {"dtype": "bfloat16", "tokens": [16384], "heads": 8, "dim": 128, "kernel": 255},
    {"dtype": "bfloat16", "tokens": [128, 128], "heads": 8, "dim": 128, "kernel": 40},
    {"dtype": "bfloat16", "tokens": [96, 96], "heads": 8, "dim": 128, "kernel": 15, "dilation": 2},
    {"dtype": "bfloat16", "tokens": [16, 32, 32], "heads": 8, "dim": 128, "kernel": [5, 9, 9]},
    {"dtype": "bfloat16", "tokens": [16384], "heads": 8, "dim": 64, "kernel": 1024},
    {"dtype": "bfloat16", "tokens": [128, 128], "heads": 8, "dim": 64, "kernel": 25},
    {"dtype": "bfloat16", "tokens": [16, 32, 32], "heads": 8, "dim": 64, "kernel": [7, 7, 7]},
    {"dtype": "bfloat16", "tokens": [8192], "heads": 8, "dim": 256, "kernel": 1024},
    {"dtype": "bfloat16", "tokens": [64, 64], "heads": 8, "dim": 256, "kernel": 21},
    # Small ones, in which blocks begin and end much of the time
    {"dtype": "bfloat16", "tokens": [8192], "heads": 16, "batch": 4, "dim": 64, "kernel": 65},
    {"dtype": "bfloat16", "tokens": [64, 64], "heads": 12, "batch": 8, "dim": 64, "kernel": 13},
    {"dtype": "bfloat16", "tokens": [64, 64], "heads": 8, "batch": 8, "dim": 64, "kernel": 7},
    {"dtype": "bfloat16", "tokens": [56, 56], "heads": 2, "batch": 64, "dim": 32, "kernel": 7},
    {"dtype": "bfloat16", "tokens": [14, 14], "heads": 8, "batch": 64, "dim": 32, "kernel": 7},
    {"dtype": "bfloat16", "tokens": [16, 16, 16], "heads": 4, "batch": 4, "dim": 32, "kernel": 3},
    {"dtype": "bfloat16", "tokens": [48, 48], "heads": 4, "batch": 4, "dim": 128, "kernel": 5},
    # Other dtypes
    {"dtype": "float32", "tokens": [8192], "heads": 8, "dim": 64, "kernel": 63},
    {"dtype": "float32", "tokens": [4096], "heads": 8, "dim": 128, "kernel": 511},
    {"dtype": "float32", "tokens": [64, 64], "heads": 8, "dim": 64, "kernel": 21},
    {"dtype": "float32", "tokens": [56, 56], "heads": 4, "batch": 8, "dim": 32, "kernel": 5},
    {"dtype": "float32", "tokens": [8, 16, 16], "heads": 8, "dim": 64, "kernel": [3, 5, 5]},
    {"dtype": "float32", "tokens": [14, 14], "heads": 8, "batch": 16, "dim": 32, "kernel": 13},
    {"dtype": "float64", "tokens": [2048], "heads": 8, "dim": 64, "kernel": 127},
    {"dtype": "float64", "tokens": [28, 28], "heads": 8, "dim": 32, "kernel": 7},
    {"dtype": "float64", "tokens": [1024], "heads": 8, "dim": 64, "kernel": 1023},
)
"""The problems to measure, of `_measure.cases`, with forward and backward."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One call to measure."""

    trials: Trials
    backend: Any
    program: Program
    plans: dict[str, Any]
    """Of every pass."""

    @property
    def name(self) -> str:
        told = ", ".join(str(plan) for plan in self.plans.values()) or "its own plan"
        operation = self.trials.operation
        return f"{self.backend.NAME} {operation.operation} of {describe(operation)}, {told}"

    def model(self, rates: Any) -> Any:
        """Its predicted milliseconds."""
        trials = self.trials
        return self.backend.model(trials.operation, trials.device, self.plans, rates)


def calibrate(xp: Any, device: Device) -> Row:
    """Measure, fit and keep; what was found out."""
    start = time.monotonic()
    problems = [problem_of(case, case["dtype"]) for case in CASES]
    operations = operations_of(problems, xp, device)
    times, failed = measured(in_order(operations), device, start + SECONDS)
    if not times:
        raise RuntimeError("nothing could be measured: " + "; ".join(failed[:3]))
    found = fitted(times)
    kept = {name: rates_of for name, (_, rates_of, _) in found.items()}
    backends = {trial.backend.NAME: trial.backend for trial in times}
    defaults = {name: backends[name].RATES for name in kept}
    rates.store(device, kept, defaults)
    _call.forget()
    return {
        "seconds": round(time.monotonic() - start, 1),
        "measured": len(times),
        "failed": failed,
        "backends": [_row(name, defaults[name], *found[name]) for name in found],
        "choices": {
            "before": cost_of_choices(times, {}),
            "after": cost_of_choices(times, kept),
        },
    }


def operations_of(problems: list[Problem], xp: Any, device: Device) -> list[Trials]:
    """The forward of every problem, and its backward."""
    return [
        Trials(operation, arguments, device)
        for arguments in (Arguments(problem, xp) for problem in problems)
        for operation in (arguments.problem, arguments.problem.gradient)
    ]


def trials_of(trials: Trials, turn: int) -> Iterator[Trial]:
    """What is to be measured of an operation: in turn 0 the planner's plans, then others."""
    operation, device = trials.operation, trials.device
    predicted = {
        backend: backend.predicted_ms(operation, device)
        for backend in _backends.BACKENDS
        if hasattr(backend, "model") and backend.unsupported(operation, device) is None
    }
    for backend, ms in predicted.items():
        if ms > FAR_SLOWER * min(predicted.values()):
            continue
        for forced in [{}] if turn == 0 else _others(backend, operation, device, turn):
            program, planned = trials.program(backend, forced)
            plans = {each.pass_: each.plan for each in planned}
            yield Trial(trials, backend, program, plans)


def _others(
    backend: Backend, operation: Problem, device: Device, turn: int
) -> Iterator[dict[str, Any]]:
    """For every pass another of the plans worth measuring, all kinds of them in all turns."""
    if not hasattr(backend, "plans"):
        return
    for pass_, plans in backend.plans(operation, device).items():
        others = plans[1:]  # the first is the planner's
        if len(others) >= turn:
            yield {pass_: others[(turn - 1) * len(others) // ALTERNATIVES]}


def in_order(operations: list[Trials]) -> list[Trial]:
    """All trials, in such an order that the first of them tell of everything."""
    order = []
    for turn in range(ALTERNATIVES + 1):
        trials = [trial for each in operations for trial in trials_of(each, turn)]
        Random(turn).shuffle(trials)
        order += trials
    return order


def measured(
    trials: list[Trial], device: Device, end: float
) -> tuple[dict[Trial, float], list[str]]:
    """The times of trials, as long as there is time, and what is to be said of those that fail."""
    times: dict[Trial, float] = {}
    failed = []
    with counting(f"calls on {device.name}", len(trials)) as advance:
        for first in range(0, len(trials), TOGETHER):
            batch = trials[first : first + TOGETHER]
            if time.monotonic() > end:
                break
            kernels = dict.fromkeys(each for trial in batch for each in trial.program.kernels)
            with suppress(_jit.CompilationError):  # which a call will have, too
                _jit.precompile(kernels, [device.arch])
            for trial in batch:
                if time.monotonic() > end:
                    break
                try:
                    times[trial] = measure(trial)
                except Exception as error:  # whatever it is, the other trials go on
                    failed.append(f"{trial.name}: {type(error).__name__}: {error}")
                advance()
    return times, failed


def measure(trial: Trial) -> float:
    return trial.trials.ms(trial.program, BUDGET_MS)


Found = tuple[list[Measured], Any, frozenset[str]]
"""Of a backend: its calls, its rates, and the paths of those that the calls tell of."""


def fitted(times: dict[Trial, float]) -> dict[str, Found]:
    """The rates of every backend that was measured often enough, by its name."""
    found = {}
    for name in dict.fromkeys(trial.backend.NAME for trial in times):
        calls = {trial: ms for trial, ms in times.items() if name == trial.backend.NAME}
        if len(calls) >= FEWEST:
            measured = [Measured(trial.model, ms) for trial, ms in calls.items()]
            default = next(iter(calls)).backend.RATES
            found[name] = measured, *fit(measured, default)
    return found


def _row(
    name: str, default: Any, measured: list[Measured], rates: Any, seen: frozenset[str]
) -> Row:
    """What was found out of one backend."""
    before, after = leaves(default), leaves(rates)
    return {
        "name": name,
        "measured": len(measured),
        "error_before": round(root_mean_square(each.error(default) for each in measured), 4),
        "error_after": round(root_mean_square(each.error(rates) for each in measured), 4),
        "rates": {
            path: {"default": before[path], "fitted": after[path], "seen": path in seen}
            for path in before
        },
    }


def cost_of_choices(times: dict[Trial, float], kept: dict[str, Any]) -> Row:
    """How much slower than the best measured call of an operation the one is that is predicted to
    be the fastest, by the rates in `kept` and otherwise by the defaults."""
    losses = {}
    for trials in dict.fromkeys(trial.trials for trial in times):
        alike = {trial: ms for trial, ms in times.items() if trial.trials is trials}

        def predicted(trial: Trial) -> float:
            ms: float = trial.model(kept.get(trial.backend.NAME, trial.backend.RATES))
            return ms

        chosen = min(alike, key=predicted)
        losses[chosen] = alike[chosen] / min(alike.values())
    worst = max(losses, key=lambda trial: losses[trial])
    mean = math.exp(fmean(map(math.log, losses.values())))
    return {
        "operations": len(losses),
        "mean": round(mean - 1, 4),
        "worst": round(losses[worst] - 1, 4),
        "worst_call": worst.name,
    }
