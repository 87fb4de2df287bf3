"""Ctrl-C at a chosen place."""

from __future__ import annotations

from collections.abc import Callable


def interrupt_at_entry(number: int) -> Callable[..., None]:
    """A profile that raises KeyboardInterrupt where this thread enters a function, at the n-th."""
    left = number

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal left
        if event == "call":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    return profile
