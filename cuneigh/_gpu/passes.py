"""The passes of attention, and what the rows and the columns of each are.

A kernel works on rows and columns: a block keeps a box of rows and goes over the boxes of columns
that lie in their windows. In the forward pass and for dQ rows are queries and columns are keys; the
window of a row is the window of the query. For dK and dV, and where one kernel computes all three
gradients, rows are keys and columns are queries; the window of a row is the inverse window of the
key, which holds the queries that see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cuneigh._problem import Problem
from cuneigh._window import Axis, Index


@dataclass(frozen=True, slots=True)
class Pass:
    """What one kernel of an operation computes."""

    name: str
    rows_are_keys: bool
    products: float
    """Its matrix products, in units of those of the forward pass."""
    adds: bool = False
    """Whether blocks add to sums of the columns that they have in common.

    Then boxes of columns begin where a block's window union does, but along the last axis at the
    begin of a granule (`boxes.GRANULE`).
    """

    moves: bool = False
    """Whether every array comes with its tangent."""

    def __str__(self) -> str:
        return self.name

    def row_tokens(self, problem: Problem) -> tuple[int, ...]:
        """The lengths of the layout of the rows."""
        return problem.key_tokens if self.rows_are_keys else problem.tokens

    def column_tokens(self, problem: Problem) -> tuple[int, ...]:
        """The lengths of the layout of the columns."""
        return problem.tokens if self.rows_are_keys else problem.key_tokens

    def heads(self, problem: Problem) -> int:
        """The heads of the rows."""
        return problem.kv_heads if self.rows_are_keys else problem.heads

    def rows(self, problem: Problem) -> int:
        """The number of rows in all heads and batch entries."""
        return problem.batch * self.heads(problem) * math.prod(self.row_tokens(problem))

    def length(self, axis: Axis) -> int:
        """The number of rows along an axis."""
        return axis.key_length if self.rows_are_keys else axis.length

    def group_length(self, axis: Axis, group: Index) -> Index:
        """The number of rows in a dilation group."""
        return axis.key_group_length(group) if self.rows_are_keys else axis.group_length(group)

    def window(self, axis: Axis) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The function from (index, group) of a row to its window."""
        return axis.inverse if self.rows_are_keys else axis.window


FORWARD = Pass("forward", rows_are_keys=False, products=1.0)
JVP = Pass("jvp", rows_are_keys=False, products=3.0, moves=True)
"""Output and lse, and their tangents."""
BACKWARD = Pass("backward", rows_are_keys=True, products=2.5, adds=True)
"""All three gradients: blocks add to sums of dQ."""
DQ = Pass("dq", rows_are_keys=False, products=1.5)
DKV = Pass("dkv", rows_are_keys=True, products=2.0)
DK = Pass("dk", rows_are_keys=True, products=1.5)
DV = Pass("dv", rows_are_keys=True, products=1.0)
HVP_DQ = Pass("hvp_dq", rows_are_keys=False, products=4.0, moves=True)
"""How dQ changes along tangents, and likewise the others."""
HVP_DKV = Pass("hvp_dkv", rows_are_keys=True, products=5.0, moves=True)
HVP_DK = Pass("hvp_dk", rows_are_keys=True, products=4.0, moves=True)
HVP_DV = Pass("hvp_dv", rows_are_keys=True, products=2.5, moves=True)
