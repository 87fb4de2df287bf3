"""Numbers that know how they are made of rates, by which cost models are fitted.

A cost model is a function of rates, written once. Planners call it with plain numbers. With those
of `linear` in their place the same function returns a `Linear`: the prediction, and how often each
rate is part of it. Where a model takes the greater of two, it is linear as long as that one stays
the greater.

The rates of a model are a named tuple of numbers, or of such tuples again. A plain number is a time
(in milliseconds or cycles) that is multiplied by how often it passes; a `Speed` divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Rates = TypeVar("Rates", bound=tuple[Any, ...])


class Speed(float):
    """A rate that an amount is divided by, such as bytes in a millisecond."""


class Linear:
    """A sum of numbers, each times a rate, or over one that is a `Speed`."""

    __slots__ = ("terms", "value")

    def __init__(self, value: float, terms: Mapping[str, float]) -> None:
        self.value = value
        self.terms = terms
        """What each rate is multiplied by, or what is divided by it, by its path."""

    def __add__(self, other: Any) -> Linear:
        if not isinstance(other, Linear):
            if other != 0:
                raise TypeError(f"{other} is part of a prediction, but of no rate")
            return self
        terms = dict(self.terms)
        for path, amount in other.terms.items():
            terms[path] = terms.get(path, 0.0) + amount
        return Linear(self.value + other.value, terms)

    __radd__ = __add__

    def __mul__(self, number: float) -> Linear:
        terms = {path: amount * number for path, amount in self.terms.items()}
        return Linear(self.value * number, terms)

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> Linear:
        return self * (1 / number)

    def __lt__(self, other: Any) -> bool:
        return self.value < _value(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > _value(other)


class _Divisor:
    """A `Speed` in a linear form."""

    def __init__(self, value: float, path: str) -> None:
        self._value, self._path = value, path

    def __rtruediv__(self, amount: float) -> Linear:
        return Linear(amount / self._value, {self._path: amount})


def _value(number: Any) -> float:
    value: float = number.value if isinstance(number, Linear) else number
    return value


def linear(rates: Rates) -> Rates:
    """The rates as what makes a model return its linear form."""

    def form(path: str, rate: float) -> Any:
        return _Divisor(rate, path) if isinstance(rate, Speed) else Linear(rate, {path: 1.0})

    return _mapped(rates, form, "")  # type: ignore[no-any-return]


def leaves(rates: tuple[Any, ...]) -> dict[str, float]:
    """Every rate by its path, the names that lead to it: "forward.product"."""
    return dict(_leaves(rates, ""))


def _leaves(rates: Any, before: str) -> Iterator[tuple[str, float]]:
    for name, value in zip(rates._fields, rates, strict=True):
        if isinstance(value, tuple):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def replaced(rates: Rates, values: Mapping[str, float]) -> Rates:
    """The tuple with other rates, of which `values` has every one by its path."""

    def value(path: str, rate: float) -> float:
        return Speed(values[path]) if isinstance(rate, Speed) else float(values[path])

    return _mapped(rates, value, "")  # type: ignore[no-any-return]


def _mapped(rates: Any, function: Callable[[str, float], Any], before: str) -> Any:
    return type(rates)(
        *(
            _mapped(value, function, f"{before}{name}.")
            if isinstance(value, tuple)
            else function(f"{before}{name}", value)
            for name, value in zip(rates._fields, rates, strict=True)
        )
    )
