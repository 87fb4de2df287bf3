"""What an hvp of several backends has in common."""

from __future__ import annotations

from dataclasses import dataclass

from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._gpu.rows import RowPlan, attention_plan
from cuneigh._gpu.views import Views
from cuneigh._problem import OfResults, Operands, Problem


def all_of(problem: Problem, wanted: OfResults, program: Program) -> OfResults:
    """The tangents of both results, in workspace where they are not wanted."""
    specs = problem.output, problem.lse
    return OfResults(
        *(
            program.allocate(*spec) if array is None else array
            for array, spec in zip(wanted, specs, strict=True)
        )
    )


@dataclass(frozen=True)
class HvpArrays:
    """What kernels take that give every token to a group of lanes.

    They are the arrays of an hvp, its head vectors contiguous, and what it computes of every query.
    """

    operands: Operands
    tangents: Operands
    grad_output: Array
    tangent_grad_output: Array | None
    """None where it is 0."""
    lse: Array
    tangent_lse: Array
    delta: Array
    tangent_delta: Array

    def views(self, problem: Problem) -> Views:
        """`HvpArguments` of cuda/cuneigh/hvp.cuh."""
        views = Views(problem.rank)
        views.mask(self.operands.key_mask)
        for each in (self.operands, self.tangents):
            views.vectors(*each[:3])
            views.additional(each.additional_keys, each.additional_values)
            views.bias(each.rpb)
        views.vectors(self.grad_output, self.tangent_grad_output)
        views.scalars(self.lse, self.tangent_lse, self.delta, self.tangent_delta)
        return views

    def plan(
        self, problem: Problem, gradients: Operands | None = None, *outputs: Array | None
    ) -> RowPlan:
        """The plan for these arrays, for `gradients`, and for `outputs` with vectors of values."""
        results = gradients or Operands()
        moved = self.tangents
        return attention_plan(
            problem,
            self.operands,
            keys=(moved.query, moved.key, moved.additional_keys, results.query, results.key),
            values=(
                *(moved.value, moved.additional_values, results.value, *outputs),
                *(self.grad_output, self.tangent_grad_output),
            ),
            with_tangents=True,
        ).of(problem)
