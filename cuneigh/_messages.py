"""How errors repeat what they were given."""

from __future__ import annotations

SHOWN = 500
"""Characters of a value that an error repeats."""


def shown(value: object) -> str:
    """A value as an error repeats it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no int of more than a few thousand digits
        return f"(a number too long to print, of type {type(value).__name__})"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
