"""One operation of a problem on a GPU, with any backend and any plans: checked, then timed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from cuneigh import _programs
from cuneigh._backends import Backend
from cuneigh._device import Device
from cuneigh._gpu import tuned
from cuneigh._gpu.announce import Planned
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import start_words
from cuneigh._measure import arrays, checks, ours
from cuneigh._measure.clock import GpuClock
from cuneigh._problem import Operands, Problem


class Arguments:
    """The arrays of a forward and of its backward, made when they are needed."""

    def __init__(self, problem: Problem, xp: Any) -> None:
        self.problem, self._xp = problem, xp

    @cached_property
    def operands(self) -> Operands:
        return arrays.operands_of(self._xp, self.problem)

    @cached_property
    def given(self) -> dict[str, Any]:
        """All of them by name."""
        output, lse = ours.forward(self.problem, self.operands, None, return_lse=True)
        checks.check_forward(self.problem, self.operands, output, lse)
        grad_output = arrays.grad_output_of(self._xp, self.problem)
        given = {"output": output, "lse": lse, "grad_output": grad_output}
        return {**self.operands._asdict(), **given}


class Trials:
    """An operation, its arguments, and what its results are to be."""

    def __init__(self, operation: Problem, arguments: Arguments, device: Device) -> None:
        self.operation, self.device = operation, device
        self._arguments = arguments

    def program(self, backend: Backend, plans: Mapping[str, Any]) -> tuple[Program, list[Planned]]:
        """What a backend launches if it is forced to take these plans, by pass, and all plans."""
        with tuned.forcing(plans):
            return _programs.rehearse(self.operation, self.device, backend.NAME)

    def ms(self, program: Program, budget_ms: float) -> float:
        """The time of a program; raises WrongResultError, among others, if there is none."""
        import cupy

        names = _programs.taken(self.operation)
        results = [None if s is None else empty(s) for s in self.operation.results]
        made = [each for each in results if each is not None]
        spaces = [empty(spec) for spec in program.workspace]
        held = [*(self._arguments.given[name] for name in names), *made, *spaces]
        addresses = [*(array.data.ptr for array in held), *start_words(self.operation)]

        def call() -> None:
            program.run(addresses, cupy.cuda.get_current_stream().ptr)

        call()
        cupy.cuda.get_current_stream().synchronize()
        self._check(results)
        return GpuClock().measure(call, budget_ms).best

    def _check(self, results: list[Any]) -> None:
        forward, operands = self._arguments.problem, self._arguments.operands
        given = self._arguments.given
        if self.operation.operation == "forward":
            checks.check_forward(forward, operands, results[0], results[1])
            return
        about = forward, operands, given["grad_output"], given["output"], given["lse"]
        checks.check_gradients(*about, Operands(*results))


def empty(spec: Any) -> Any:
    """An uninitialized CuPy array."""
    import cupy
    import ml_dtypes

    dtype = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype
    return cupy.empty(spec.shape, dtype)
