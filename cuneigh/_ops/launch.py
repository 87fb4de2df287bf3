"""From arrays to a backend, which on the CPU computes at once and on a GPU by a kept program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any

from cuneigh import _backends, _device
from cuneigh._backends import Backend, Space
from cuneigh._backends._program import Program
from cuneigh._problem import Operands, Problem, Spec

Layout = tuple[tuple[int, ...], int]
"""How an array lies in memory: elements from entry to entry along each axis, address modulo 16."""


def program(
    problem: Problem,
    device: int,
    backend: str | None,
    names: tuple[str, ...],
    layouts: tuple[Layout, ...],
    results: tuple[Spec | None, ...],
    misalignments: tuple[int, ...] = (),
) -> Program:
    """The program for `problem` on a CUDA device, which is current.

    It is run with the addresses of the arguments `names`, which are laid out as `layouts`, and then
    those of `results`, None where not wanted. Results are contiguous, and at multiples of 16 unless
    `misalignments` has for each that is wanted its address modulo 16.
    """
    known = _backends.BACKENDS, _backends.settings()
    return _program(known, problem, device, backend, names, layouts, results, misalignments)


@lru_cache(maxsize=4096)
def _program(
    known: object,
    problem: Problem,
    device: int,
    backend: str | None,
    names: tuple[str, ...],
    layouts: tuple[Layout, ...],
    results: tuple[Spec | None, ...],
    misalignments: tuple[int, ...],
) -> Program:
    place = _device.cuda(device)
    chosen = _backends.choose(problem, place, backend)
    made = Program(place)
    given = {
        name: made.array(problem.spec(name), *layout)
        for name, layout in zip(names, layouts, strict=True)
    }
    off = iter(misalignments or repeat(0))
    wanted = [
        None if spec is None else made.array(spec, misalignment=next(off)) for spec in results
    ]
    perform(chosen, problem, given, wanted, made)
    return made


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
