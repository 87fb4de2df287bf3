"""What a backend launches for a problem on a GPU, recorded once for all arrays laid out alike.

`program_for` chooses the backend and has it fill the results of a `Program`, which records the
launches in place of making them; on the CPU `perform` has the backend compute. `rehearse` records
what a call would launch on a GPU that need not be at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import repeat
from typing import Any

from cuneigh import _backends, _device
from cuneigh._backends import Backend, Space, choose
from cuneigh._frameworks.contract import Layout
from cuneigh._gpu.announce import Planned, overheard
from cuneigh._gpu.arrays import contiguous
from cuneigh._gpu.program import Program
from cuneigh._problem import (
    ARRAYS,
    TANGENTS,
    JvpResults,
    OfResults,
    Operands,
    Problem,
    Spec,
    of_what,
)

KEPT = 4096
"""Programs that are kept."""


def known_backends() -> object:
    """What the choice of a backend and its programs depend on, apart from the problem."""
    return _backends.BACKENDS, _backends.settings()


@lru_cache(maxsize=KEPT)
def program_for(
    known: object,
    problem: Problem,
    device: int,
    backend: str | None,
    arguments: tuple[str, ...],
    results: tuple[Spec | None, ...],
    layouts: tuple[Layout, ...],
    misalignments: tuple[int, ...] = (),
) -> Program:
    """What the backend called `backend`, or the best one, launches for `problem` on a CUDA device.

    The arguments have the names `arguments` and the layouts `layouts`; `results` are those of the
    operation, None where not wanted. The program is run, with the device current, with the
    addresses of the arguments, in their order, then those of the results that are wanted and of the
    workspace, and then the `start_words` of any problem whose `anywhere` is `problem`.
    Results are contiguous, and at multiples of 16 unless `misalignments` has for each that is
    wanted its address modulo 16. `known` is what `known_backends` returns.
    """
    where = _device.cuda(device)
    program = Program(where)
    given = {
        name: program.array(problem.spec(name), *layout)
        for name, layout in zip(arguments, layouts, strict=True)
    }
    off = iter(misalignments or repeat(0))
    wanted = {
        name: None if spec is None else program.array(spec, misalignment=next(off))
        for name, spec in zip(ARRAYS[problem.operation].results, results, strict=True)
    }
    results_too = {f"result_{name}": array for name, array in wanted.items()}
    chosen = choose(problem, where, backend, {**given, **results_too})
    perform(chosen, problem, given, wanted, program)
    return program


def compile_gradient(
    problem: Problem,
    device: int,
    backend: str | None,
    arguments: tuple[str, ...],
    layouts: tuple[Layout, ...],
) -> None:
    """Have what the gradient of a forward needs compiled in the background, beside the forward.

    `arguments` and `layouts` are those of the forward. What else the gradient takes is expected to
    be contiguous. A gradient that no backend computes is an error of its own call, if that comes.
    """
    results = ARRAYS[problem.operation].results
    more = (*results, f"grad_{results[0]}")
    expected = tuple((contiguous(problem.spec(name).shape), 0) for name in more)
    with suppress(RuntimeError, TypeError):  # no backend, or no gradients in this dtype
        program_for(
            known_backends(),
            problem.gradient,
            device,
            backend,
            (*arguments, *more),
            problem.gradient.results,
            (*layouts, *expected),
        ).compile()


def rehearse(
    problem: Problem, device: _device.Device, backend: str | None
) -> tuple[Program, list[Planned]]:
    """What a call of contiguous arrays would launch on a GPU, which need not be at hand, and why.

    Raises like `choose`.
    """
    program = Program(device)
    given = {name: program.array(problem.spec(name)) for name in taken(problem)}
    names = ARRAYS[problem.operation].results
    wanted = {
        name: None if spec is None else program.array(spec)
        for name, spec in zip(names, problem.results, strict=True)
    }
    with overheard() as plans:
        perform(choose(problem, device, backend), problem, given, wanted, program)
    return program, plans


def taken(problem: Problem) -> tuple[str, ...]:
    """The names of the arrays that a problem takes, without a gradient of lse and its tangent."""
    absent = [name for name, spec in problem.specs._asdict().items() if spec is None]
    names = ARRAYS[problem.operation].arguments
    return tuple(
        name for name in names if not name.endswith("grad_lse") and of_what(name) not in absent
    )


def perform(
    backend: Backend,
    problem: Problem,
    given: Mapping[str, Any],
    results: Mapping[str, Any],
    space: Space,
) -> None:
    """Have `backend` fill `results` from the arguments `given`, both by name.

    What is absent from either, or None, was not given or is not wanted.
    """
    operands = Operands(*map(given.get, Operands._fields))
    gradients = Operands(*map(results.get, Operands._fields))
    match problem.operation:
        case "forward":
            backend.forward(problem, operands, results["output"], results.get("lse"), space)
        case "backward":
            backend.backward(
                problem,
                operands,
                given["grad_output"],
                given["output"],
                given["lse"],
                given.get("grad_lse"),
                gradients,
                space,
            )
        case "jvp":
            tangents = Operands(*map(given.get, TANGENTS))
            wanted = JvpResults(*map(results.get, JvpResults._fields))
            backend.jvp(problem, operands, tangents, wanted, space)
        case "hvp":
            backend.hvp(
                problem,
                operands,
                OfResults(given["output"], given["lse"]),
                OfResults(given["grad_output"], given.get("grad_lse")),
                Operands(*map(given.get, TANGENTS)),
                OfResults(given.get("tangent_grad_output"), given.get("tangent_grad_lse")),
                gradients,
                OfResults(results.get("tangent_output"), results.get("tangent_lse")),
                space,
            )
        case "qk":
            backend.qk(problem, operands, results["logits"], space)
        case "qk_backward":
            backend.qk_backward(problem, operands, given["grad_logits"], gradients, space)
        case "av":
            backend.av(problem, given["weights"], operands, results["output"], space)
        case "av_backward":
            backend.av_backward(
                problem,
                given["weights"],
                operands,
                given["grad_output"],
                results["weights"],
                gradients,
                space,
            )
