"""From arrays to a backend, which on the CPU computes at once and on a GPU by a kept program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

from cuneigh import _backends, _device
from cuneigh._arrays import Layout
from cuneigh._backends import Backend, Space
from cuneigh._gpu.program import Program
from cuneigh._problem import Operands, Problem, Spec


class Routine:
    """What serves the calls of one problem on one GPU: a program for every layout of its arrays."""

    def __init__(
        self,
        problem: Problem,
        device: int,
        backend: str | None,
        arguments: tuple[str, ...],
        results: tuple[Spec | None, ...],
    ) -> None:
        self._problem, self._arguments, self._results = problem, arguments, results
        self._place = _device.cuda(device)
        self._backend = _backends.choose(problem, self._place, backend)
        self.program = lru_cache(maxsize=256)(self._program)

    def _program(self, layouts: tuple[Layout, ...], misalignments: tuple[int, ...] = ()) -> Program:
        """The program for arguments that are laid out as `layouts`; the device is current.

        It is run with the addresses of the arguments, in their order, and then those
        of the results that are wanted. Results are contiguous, and at multiples of 16 unless
        `misalignments` has for each that is wanted its address modulo 16.
        """
        made = Program(self._place)
        given = {
            name: made.array(self._problem.spec(name), *layout)
            for name, layout in zip(self._arguments, layouts, strict=True)
        }
        off = iter(misalignments or repeat(0))
        wanted = [
            None if spec is None else made.array(spec, misalignment=next(off))
            for spec in self._results
        ]
        perform(self._backend, self._problem, given, wanted, made)
        return made


def known_backends() -> object:
    """What the choice of a backend and its programs depend on, apart from the problem."""
    return _backends.BACKENDS, _backends.settings()


@lru_cache(maxsize=4096)
def routine_for(
    known: object,
    problem: Problem,
    device: int,
    backend: str | None,
    arguments: tuple[str, ...],
    results: tuple[Spec | None, ...],
) -> Routine:
    """The routine for `problem` on a CUDA device, by the backend called `backend` or the best one.

    It takes arrays called `arguments` and fills `results`, None where not wanted. `known` is what
    `known_backends` returns.
    """
    return Routine(problem, device, backend, arguments, results)


def perform(
    backend: Backend,
    problem: Problem,
    given: Mapping[str, Any],
    results: Sequence[Any],
    space: Space,
) -> None:
    """Have `backend` fill `results` from the arguments, `given` by name.

    Results are in the order in which the public function returns them, None where not wanted.
    """
    operands = Operands(*map(given.get, Operands._fields))
    match problem.operation:
        case "forward":
            output, lse = results
            backend.forward(problem, operands, output, lse, space)
        case "backward":
            backend.backward(
                problem,
                operands,
                given["grad_output"],
                given["output"],
                given["lse"],
                given.get("grad_lse"),
                Operands(*results),
                space,
            )
        case "qk":
            (logits,) = results
            backend.qk(problem, operands, logits, space)
        case "qk_backward":
            backend.qk_backward(problem, operands, given["grad_logits"], Operands(*results), space)
        case "av":
            (output,) = results
            backend.av(problem, given["weights"], operands, output, space)
        case "av_backward":
            grad_weights, *gradients = results
            backend.av_backward(
                problem,
                given["weights"],
                operands,
                given["grad_output"],
                grad_weights,
                Operands(*gradients),
                space,
            )
