"""What backends say that compute ordinary problems only."""

from __future__ import annotations

from cuneigh._problem import Problem


def extraordinary(problem: Problem) -> str | None:
    """Why such a backend cannot run `problem`: what of it is not ordinary; None if nothing is."""
    if problem.has_key_mask:
        return "does not take key_mask"
    for number, axis in enumerate(problem.axes):
        if axis.is_part:
            return f"does not take parts of a layout, as on axis {number}"
        if not axis.is_ordinary:
            return f"does not take border={axis.border!r}, as on axis {number}"
    return None
