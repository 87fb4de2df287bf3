"""`profile --tune`: the plans of a problem measured one by one, and the fastest kept.

A pass is tuned by itself: its plans are measured with those of the other passes as the planner made
them. What is faster counts only if its results are right and it gains more than `NOISE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cuneigh import _backends, _call
from cuneigh._backends import Backend
from cuneigh._device import Device
from cuneigh._gpu import tuned
from cuneigh._measure.trials import Arguments, Trials
from cuneigh._problem import Problem
from cuneigh.cli.profile.document import FAR_SLOWER, Row, kinds
from cuneigh.cli.terminal import progress

NOISE = 0.01
"""The share by which a plan must be faster to be kept in place of the planner's."""

Trial = tuple[Backend, Mapping[str, Any]]
"""A backend, and the plans that it is forced to take, by pass."""


def tune(problem: Problem, xp: Any, device: Device, backward: bool, budget_ms: float) -> list[Row]:
    """Tune a forward, and its backward if that is wanted; a row for each says what was gained."""
    rows = []
    for problems in kinds(problem, backward).values():
        operation = problems[-1]
        tuner = Tuner(operation, problem, xp, device, budget_ms)
        title = f"{operation.operation}: plans"
        for trial in progress(tuner.trials(), title, tuner.count()):
            tuner.measure(*trial)
        entry = tuner.entry()
        tuned.store(operation, device, entry)
        rows.append(
            {
                "operation": operation.operation,
                "backend": entry.backend,
                "planner_backend": tuner.planned,
                "plans": dict(entry.plans),
                "tuned_ms": entry.ms,
                "planner_ms": entry.planner_ms,
                "gain": round(entry.planner_ms / entry.ms - 1, 4),
                "tried": len(tuner.times),
                "failed": tuner.failed,
            }
        )
    _call.forget()
    return rows


class Tuner:
    """The trials of one operation of a problem."""

    def __init__(
        self, operation: Problem, forward: Problem, xp: Any, device: Device, budget_ms: float
    ) -> None:
        self.operation, self.device, self.budget_ms = operation, device, budget_ms
        self.times: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        """Of every trial: backend and (pass, text of the plan)."""
        self.failed: list[str] = []
        predicted = {
            backend: backend.predicted_ms(operation, device)
            for backend in _backends.BACKENDS
            if backend.unsupported(operation, device) is None
        }
        self.planned = min(predicted, key=lambda backend: predicted[backend]).NAME
        self.backends = [
            backend
            for backend, ms in predicted.items()
            if ms <= FAR_SLOWER / 4 * min(predicted.values())
        ]
        self._trials = Trials(operation, Arguments(forward, xp), device)

    def trials(self) -> Iterator[Trial]:
        """Every backend as it plans, and with every plan of every pass."""
        for backend in self.backends:
            yield backend, {}
            plans = getattr(backend, "plans", None)
            for pass_, candidates in (plans(self.operation, self.device) if plans else {}).items():
                for plan in candidates[1:]:  # the first is the planner's
                    yield backend, {pass_: plan}

    def count(self) -> int:
        return sum(1 for _ in self.trials())

    def measure(self, backend: Backend, plans: Mapping[str, Any]) -> None:
        """Check and time a trial; one that fails or is wrong is left out and noted."""
        key = backend.NAME, frozenset((pass_, repr(plan)) for pass_, plan in plans.items())
        try:
            self.times[key] = self._time(backend, plans)
        except Exception as error:  # whatever it is, the other trials go on
            told = ", ".join(map(str, plans.values())) or "its own plan"
            self.failed.append(f"{backend.NAME}, {told}: {type(error).__name__}: {error}")

    def _time(self, backend: Backend, plans: Mapping[str, Any]) -> float:
        program, _ = self._trials.program(backend, plans)
        return self._trials.ms(program, self.budget_ms)

    def entry(self) -> tuned.Entry:
        """What to keep: of the fastest backend the fastest plan of each pass, measured together."""
        own = {
            backend.NAME: self.times[backend.NAME, frozenset()]
            for backend in self.backends
            if (backend.NAME, frozenset()) in self.times
        }
        if not own:
            raise RuntimeError("no backend could be measured: " + "; ".join(self.failed))
        best: tuple[float, str, dict[str, Any]] | None = None
        for backend in self.backends:
            name = backend.NAME
            if name not in own:
                continue
            plans = self._best_plans(backend, own[name])
            if len(plans) > 1:
                self.measure(backend, plans)
            texts = {pass_: repr(plan) for pass_, plan in plans.items()}
            ms = self.times.get((name, frozenset(texts.items())), own[name])
            if ms >= own[name] * (1 - NOISE):
                ms, texts = own[name], {}
            if best is None or ms < best[0]:
                best = ms, name, texts
        assert best is not None, "there is one for every time of its own"
        return tuned.Entry(best[1], best[2], best[0], own.get(self.planned, best[0]))

    def _best_plans(self, backend: Backend, own_ms: float) -> dict[str, Any]:
        """Of each pass the plan that is faster than the planner's by more than noise, if any."""
        plans = getattr(backend, "plans", None)
        found = {}
        for pass_, candidates in (plans(self.operation, self.device) if plans else {}).items():
            times = {
                plan: self.times.get((backend.NAME, frozenset([(pass_, repr(plan))])), own_ms)
                for plan in candidates
            }
            fastest = min(times, key=lambda plan: times[plan])
            if times[fastest] < own_ms * (1 - NOISE):
                found[pass_] = fastest
        return found
