"""What the arguments of a module of NATTEN amount to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """A module of some generation."""

    arguments: dict[str, Any]
    """Those of cuneigh's module."""
    attributes: dict[str, Any]
    """What modules of that generation have beside the attributes of cuneigh's, or unlike them."""
    absent: tuple[str, ...] = ()
    """What they don't have."""


Module = Callable[..., Settings]
"""Takes the arguments of a module of some generation."""
