"""Rates of a cost model that explain measured times, by non-negative least squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from cuneigh._gpu.linear import Linear, Speed, leaves, linear, replaced


class Measured(NamedTuple):
    """One call."""

    model: Callable[[Any], Any]
    """Its predicted milliseconds as a function of rates."""
    ms: float
    """What it took."""

    def error(self, rates: Any) -> float:
        """The logarithm of predicted over measured."""
        return math.log(self.model(rates) / self.ms)


class Fit(NamedTuple):
    """The rates that explain measured times best."""

    rates: Any
    seen: frozenset[str]
    """The paths of the rates that the measured calls tell of."""


DOUBT = 0.05
"""How much it counts, beside one measurement, that a rate is as expected.

Without it a rate that nearly nothing depends on could be anything.
"""
LEAST = 1e-3
"""Of what it is expected to be, the least that a time may be: a rate that is 0 cannot divide."""
ROUNDS = 20
CLOSE = 1e-4
"""The change of all predictions below which rates are found."""


def fit(measured: Sequence[Measured], default: Any) -> Fit:
    """The rates for which the squares of all relative errors are the least together.

    What is the greater of two parts of a prediction depends on the rates, too: as long as that
    changes, the fit is repeated. Every rate is expected to be that of `default`, all scaled alike,
    and is so where no call tells of it.
    """
    scale = median(each.ms / each.model(default) for each in measured)
    expected = {path: scale * time for path, time in times_of(default).items()}
    times, rates, before = dict(expected), of_times(default, expected), None
    for _ in range(ROUNDS):
        forms = [each.model(linear(rates)) for each in measured]
        now = np.array([form.value for form in forms])
        if before is not None and np.abs(now / before - 1).max() < CLOSE:
            break
        before = now
        times.update(_solve(forms, measured, expected))
        rates = of_times(default, times)
    return Fit(rates, frozenset(path for form in forms for path in form.terms))


def times_of(rates: Any) -> dict[str, float]:
    """What an amount is multiplied by for every rate: a `Speed` divides."""
    return {
        path: 1 / rate if isinstance(rate, Speed) else rate for path, rate in leaves(rates).items()
    }


def of_times(like: Any, times: dict[str, float]) -> Any:
    """The opposite of `times_of`; `like` says which are `Speed`."""
    values = {
        path: 1 / times[path] if isinstance(rate, Speed) else times[path]
        for path, rate in leaves(like).items()
    }
    return replaced(like, values)


def _solve(
    forms: Sequence[Linear], measured: Sequence[Measured], expected: dict[str, float]
) -> dict[str, float]:
    """The times that explain the measured ones best, of the rates that are part of any."""
    from scipy.optimize import nnls

    paths = list(dict.fromkeys(path for form in forms for path in form.terms))
    shares = np.array(
        [
            [form.terms.get(path, 0.0) / each.ms for path in paths]
            for form, each in zip(forms, measured, strict=True)
        ]
    )
    # In units of what is expected, or of what would explain everything
    units = np.array(
        [
            expected[path] or 1 / column.max(initial=1e-300)
            for path, column in zip(paths, shares.T, strict=True)
        ]
    )
    known = np.array([expected[path] > 0 for path in paths])
    doubts = DOUBT * np.eye(len(paths))[known]
    factors, _ = nnls(
        np.concatenate((shares * units, doubts)),
        np.concatenate((np.ones(len(forms)), DOUBT * np.ones(len(doubts)))),
    )
    factors = np.where(known, np.maximum(factors, LEAST), factors)
    return dict(zip(paths, (factors * units).tolist(), strict=True))


def root_mean_square(errors: Iterable[float]) -> float:
    """Of logarithms, as a share: 0.1 is 10 %."""
    squares = [error**2 for error in errors]
    return math.expm1(math.sqrt(sum(squares) / len(squares)))
