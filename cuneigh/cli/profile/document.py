"""What `profile` finds out, as a document for machines; `report` prints it for people.

A case has rows, one for each contender and kind. A row holds times and what follows from them, or a
`reason` why there is none, or an `error` of a contender of ours, which is a fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from cuneigh import _backends, _settings
from cuneigh._backends import Backend, choose
from cuneigh._device import Device
from cuneigh._gpu.announce import describe
from cuneigh._measure import arrays, checks, ours, peers
from cuneigh._measure.cases import Case
from cuneigh._measure.clock import Clock, CpuClock, GpuClock, Times
from cuneigh._measure.peers.clock import TorchClock
from cuneigh._measure.provenance import provenance
from cuneigh._problem import Operands, Problem
from cuneigh._programs import rehearse
from cuneigh.cli.terminal import patience

Row = dict[str, Any]

FORWARD, STEP = "forward", "forward_backward"
KINDS = {FORWARD: "forward", STEP: "forward and backward"}
"""What is timed, and how people are told."""

FAR_SLOWER = 20.0
"""How often longer than the fastest a backend is predicted to take that is not timed unasked."""


def heading(device: Device, dtype: str) -> dict[str, Any]:
    """Where the figures come from, and what this device reaches."""
    found = clock_of(device).ceilings(dtype)
    rounded = {name: float(f"{value:.4g}") for name, value in found._asdict().items()}
    return {**provenance(device), "ceilings": rounded}


def clock_of(device: Device) -> Clock:
    """What measures our calls."""
    return GpuClock() if device.kind == "cuda" else CpuClock()


def kinds(problem: Problem, backward: bool) -> dict[str, tuple[Problem, ...]]:
    """What is timed, each with the problems whose calls it consists of."""
    found: dict[str, tuple[Problem, ...]] = {FORWARD: (problem,)}
    if backward:
        found[STEP] = (problem, problem.gradient)
    return found


# Without running anything


def dry_run(case: Case, device: Device, options: argparse.Namespace) -> dict[str, Any]:
    """Every backend with its plans and predicted times, or its reason for refusing."""
    rows = []
    for kind, problems in kinds(case.problem, options.backward).items():
        chosen = chosen_for(problems[-1], device)
        for backend in _backends.BACKENDS:
            if options.backend and backend.NAME not in options.backend:
                continue
            row: Row = {"name": backend.NAME, "kind": kind}
            reason = unsupported(backend, problems, device)
            if reason:
                row["reason"] = reason
            else:
                row["chosen"] = chosen == backend.NAME
                row["predicted_ms"] = predicted(backend, problems, device)
                row["plans"] = plans_of(backend, problems, device)
            rows.append(row)
    return {"name": case.name, "problem": describe(case.problem), "rows": rows}


def unsupported(backend: Backend, problems: tuple[Problem, ...], device: Device) -> str | None:
    """Why a backend cannot run all of the problems."""
    reasons = (backend.unsupported(problem, device) for problem in problems)
    return next(filter(None, reasons), None)


def chosen_for(problem: Problem, device: Device) -> str | None:
    """The backend that a call without a name takes."""
    try:
        return choose(problem, device, None).NAME
    except RuntimeError:
        return None


def predicted(backend: Backend, problems: tuple[Problem, ...], device: Device) -> float:
    """Milliseconds by the backend's own cost model."""
    total = sum(backend.predicted_ms(problem, device) for problem in problems)
    return float(f"{total:.4g}")


def plans_of(backend: Backend, problems: tuple[Problem, ...], device: Device) -> dict[str, str]:
    """How a backend cuts the problems, by pass; nothing where it has no plan to tell."""
    if device.kind != "cuda":
        method = getattr(backend, "method", None)
        return {problem.operation: method(problem) for problem in problems} if method else {}
    plans = [plan for problem in problems for plan in rehearse(problem, device, backend.NAME)[1]]
    return {planned.pass_: str(planned.plan) for planned in plans}


# Timed


def require(case: Case, device: Device, options: argparse.Namespace) -> None:
    """Raise, with the reasons, if nothing that the options name can run the problem."""
    problem = kinds(case.problem, options.backward).popitem()[1][-1]
    names = options.backend or [None]
    able = (backend for backend in _backends.BACKENDS if backend.NAME in names)
    if None in names or all(backend.unsupported(problem, device) for backend in able):
        choose(problem, device, names[0])


def timed(
    case: Case, xp: Any, device: Device, ceilings: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Every contender checked and timed."""
    problem = case.problem
    operands = arrays.operands_of(xp, problem)
    grad_output = arrays.grad_output_of(xp, problem)
    rows = []
    for kind, problems in kinds(problem, options.backward).items():
        bench = Bench(problems, kind, operands, grad_output, device, ceilings, options.budget)
        rows += [bench.row_of(backend) for backend in _contenders(bench, options)]
        if options.peers:
            rows += bench.rows_of_peers()
    return {"name": case.name, "problem": describe(problem), "rows": rows}


def _contenders(bench: Bench, options: argparse.Namespace) -> list[Backend | Row]:
    """The backends to time, and rows that say why others are not."""
    problems, device = bench.problems, bench.device
    found: list[Any] = []
    times = {
        backend.NAME: predicted(backend, problems, device)
        for backend in _backends.BACKENDS
        if unsupported(backend, problems, device) is None
    }
    for backend in _backends.BACKENDS:
        name = backend.NAME
        if options.backend and name not in options.backend:
            continue
        if name not in times:
            found.append((name, unsupported(backend, problems, device)))
        elif not options.backend and times[name] > FAR_SLOWER * min(times.values()):
            ms = f"{times[name]:.3g} ms are predicted"
            found.append((name, f"far slower, {ms}: not timed unless named by --backend"))
        else:
            found.append(backend)
    return found


class Bench:
    """One kind of call of one problem, for all contenders."""

    def __init__(
        self,
        problems: tuple[Problem, ...],
        kind: str,
        operands: Operands,
        grad_output: Any,
        device: Device,
        ceilings: dict[str, float],
        budget_ms: float,
    ) -> None:
        self.problems, self.kind, self.device = problems, kind, device
        self.problem = problems[0]
        self.operands, self.grad_output = operands, grad_output
        self.ceilings, self.budget_ms = ceilings, budget_ms
        self.chosen = chosen_for(problems[-1], device)

    def row_of(self, backend: Any) -> Row:
        """The row of a backend, or of (name, reason)."""
        if isinstance(backend, tuple):
            return {"name": backend[0], "kind": self.kind, "reason": backend[1]}
        with self._patience(backend.NAME):
            return self._row_of(backend)

    def _patience(self, name: str) -> AbstractContextManager[None]:
        """Tells who is being timed, if that takes long."""
        return patience(f"{name}: {KINDS[self.kind]}")

    def _row_of(self, backend: Backend) -> Row:
        row: Row = {
            "name": backend.NAME,
            "kind": self.kind,
            "chosen": self.chosen == backend.NAME,
            "plans": plans_of(backend, self.problems, self.device),
            "predicted_ms": predicted(backend, self.problems, self.device),
        }
        tf32 = bool(_settings.ALLOW_TF32.read())
        tolerance = checks.tolerance_of(self.problem, tf32)
        about = self.problem, self.operands
        try:
            if self.kind == FORWARD:
                ours.check(*about, None, backend.NAME, tolerance)
                call: Callable[[], Any] = lambda: ours.forward(*about, backend.NAME)  # noqa: E731
            else:
                ours.check(*about, self.grad_output, backend.NAME, tolerance)
                call = lambda: ours.step(*about, self.grad_output, backend.NAME)  # noqa: E731
            return {**row, **self._figures(clock_of(self.device), call)}
        except checks.WrongResultError as error:
            return {**row, "error": f"its result is wrong: {error}"}

    def rows_of_peers(self) -> list[Row]:
        """The rows of all other libraries."""
        try:
            given = peers.given_to(self.problem, self.operands, self.grad_output)
        except peers.UnfitError as error:
            return [{"name": "PyTorch's", "kind": self.kind, "reason": str(error)}]
        expected = ours.step(self.problem, self.operands, self.grad_output, None)
        rows = []
        for name, peer in peers.PEERS.items():
            with self._patience(name):
                rows.append(self._peer(name, peer, given, expected))
        return rows

    def _peer(self, name: str, peer: peers.Peer, given: peers.Given, expected: Any) -> Row:
        row: Row = {"name": name, "kind": self.kind}
        clock = TorchClock() if given.on_gpu else CpuClock()
        try:
            calls = peer(given)
            if calls.note:
                row["note"] = calls.note
            if self.kind == STEP and calls.step is None:
                return {**row, "reason": "has no backward here"}
            about = self.problem, self.operands
            if self.kind == FORWARD:
                peers.check_forward(*about, calls)
            else:
                peers.check_step(*about, self.grad_output, expected, calls)
            call = calls.forward if self.kind == FORWARD else calls.step
            assert call is not None, "asked above"
            figures = self._figures(clock, call)
            if not given.on_gpu:
                figures["peak_bytes"] = None  # which NumPy does not allocate
            return {**row, **figures}
        except peers.UnfitError as error:
            return {**row, "reason": str(error)}
        except Exception as error:  # whatever it is, the other peers go on
            lines = str(error).strip().splitlines() or [""]
            return {**row, "reason": f"failed: {type(error).__name__}: {lines[0][:200]}"}

    def _figures(self, clock: Clock, call: Callable[[], Any]) -> Row:
        times: Times = clock.measure(call, self.budget_ms)
        best = times.best
        tflops = sum(problem.flops() for problem in self.problems) / best / 1e9
        gbps = sum(problem.bytes() for problem in self.problems) / best / 1e6
        return {
            **times._asdict(),
            "tflops": float(f"{tflops:.4g}"),
            "tflops_share": round(tflops / self.ceilings["product_tflops"], 4),
            "gbps": float(f"{gbps:.4g}"),
            "gbps_share": round(gbps / self.ceilings["copy_gbps"], 4),
            "peak_bytes": clock.peak(call),
        }
