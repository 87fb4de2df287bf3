"""Whether a peer computes what we do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuneigh._measure import checks
from cuneigh._measure.peers.contract import Calls, UnfitError
from cuneigh._problem import Operands, Problem

Step = tuple[Any, Any, Sequence[Any]]
"""Our output, lse and gradients."""


def check_forward(problem: Problem, operands: Operands, calls: Calls) -> None:
    """Raise unless a peer's output is right for queries that it treats as we do."""
    output = calls.restore(calls.forward())
    checks.check_forward(problem, operands, output, tokens=_alike(problem, calls))


def check_step(
    problem: Problem, operands: Operands, grad_output: Any, step: Step, calls: Calls
) -> None:
    """Raise unless a peer's output and gradients are right where it treats queries as we do."""
    assert calls.step is not None, "asked before"
    tokens = _alike(problem, calls)
    output, gradients = calls.step()
    checks.check_forward(problem, operands, calls.restore(output), tokens=tokens)
    found = Operands(*map(calls.restore, gradients))
    about = problem, operands, grad_output, step[0], step[1], found
    checks.check_gradients(*about, tokens=tokens)


def _alike(problem: Problem, calls: Calls) -> list[tuple[int, ...]]:
    """A sample of tokens whose windows no border cuts, if borders cut a peer's."""
    tokens = checks.sample(problem.tokens, inner=calls.inner)
    if calls.inner:
        far = problem.axes[0].kernel_size
        tokens = [t for t in tokens if far <= t[0] < problem.tokens[0] - far]
        if not tokens:
            raise UnfitError("all of its windows are cut at a border, and ours are not")
    return tokens
