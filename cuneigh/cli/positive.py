"""What options of several commands have in common: numbers above 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(convert: Callable[[str], Number]) -> Callable[[str], Number]:
    """An argparse type: a positive int or float."""

    def parse(text: str) -> Number:
        number = convert(text)
        if not number > 0:
            raise ValueError
        return number

    # argparse says "invalid positive int value"
    parse.__name__ = f"positive {getattr(convert, '__name__', 'number')}"
    return parse
