"""The launches of a jvp and of an hvp, whose arrays come with their tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuneigh._backends.fused.launch import Viewed, launch_pass, mask_of, plan_of
from cuneigh._backends.fused.passes import parts, passes
from cuneigh._backends.fused.plan import FusedPlan
from cuneigh._backends.fused.small import launch as small
from cuneigh._backends.fused.small.plan import SmallPlan
from cuneigh._gpu import sums
from cuneigh._gpu.arrays import Array, contiguous
from cuneigh._gpu.hvp import HvpArrays
from cuneigh._gpu.passes import JVP
from cuneigh._gpu.program import Program
from cuneigh._gpu.views import Views, load_width, readable
from cuneigh._problem import JvpResults, OfResults, Operands, Problem


def jvp(
    problem: Problem, operands: Operands, tangents: Operands, results: JvpResults, program: Program
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    tangents = Operands(*(readable(array, program) for array in tangents))
    operands, tangents = _alike(operands, tangents, program)
    key_bytes = load_width(
        [each for of in (operands, tangents) for each in (of.query, of.key, of.additional_keys)]
    )
    for begin, part in parts(problem):
        end = begin + part.value_dim

        def cut(array: Array | None, begin: int = begin, end: int = end) -> Array | None:
            return None if array is None else array.part(begin, end)

        def of_part(of: Operands, cut: Callable[..., Array | None] = cut) -> Operands:
            additional_values = cut(of.additional_values)
            return of._replace(value=cut(of.value), additional_values=additional_values)

        both = of_part(operands), of_part(tangents)
        outputs = [cut(results.output), cut(results.tangent_output)]
        lses = (results.lse, results.tangent_lse) if begin == 0 else (None, None)
        vectors = [*(array for of in both for array in of[:3]), *outputs]
        plan = plan_of(program, part, JVP, vectors, operands.key_mask)
        if isinstance(plan, SmallPlan):  # `JvpArguments` of cuda/fused/small/jvp.cu
            arrays: list[Viewed] = [*mask_of(part, operands), *((a, "vectors") for a in vectors)]
            small.launch(program, part, JVP, plan, [*arrays, *((lse, "scalars") for lse in lses)])
            continue
        assert isinstance(plan, FusedPlan), "there is no other kernel for it"
        views = Views(problem.rank)  # `JvpArguments` of cuda/fused/jvp.cu
        views.mask(operands.key_mask)
        for of in both:
            views.vectors(*of[:3])
            views.additional(of.additional_keys, of.additional_values)
            views.bias(of.rpb)
        views.vectors(*outputs)
        views.scalars(*lses)
        values = [*outputs, *(array for of in both for array in (of.value, of.additional_values))]
        launch_pass(program, part, JVP, plan, key_bytes, load_width(values), views)


def hvp(
    problem: Problem,
    operands: Operands,
    results: OfResults,
    incoming: OfResults,
    tangents: Operands,
    tangents_incoming: OfResults,
    gradients: Operands,
    tangents_of_results: OfResults,
    program: Program,
) -> None:
    operands = Operands(*(readable(array, program) for array in operands))
    tangents = Operands(*(readable(array, program) for array in tangents))
    operands, tangents = _alike(operands, tangents, program)
    query, tangent_query = _alike_in_memory(operands.query, tangents.query, program)
    operands, tangents = (
        operands._replace(query=query),
        tangents._replace(query=tangent_query),
    )
    mask = operands.key_mask
    grad_output, tangent_grad_output = _alike_in_memory(
        readable(incoming.output, program), readable(tangents_incoming.output, program), program
    )
    tangent_output, tangent_lse = tangents_of_results
    if tangent_lse is None:
        tangent_lse = program.allocate(*problem.lse)
    statistics, tangent_statistics = (
        program.allocate((*results.lse.shape, 2), "float32") for _ in range(2)
    )
    both = (
        (operands, grad_output, statistics),
        (tangents, tangent_grad_output, tangent_statistics),
    )
    key_bytes = load_width(
        [each for of in (operands, tangents, gradients) for each in (of.query, of.key)]
        + [of.additional_keys for of in (operands, tangents)]
    )
    value_bytes = load_width(
        [of.value for of in (operands, tangents, gradients)]
        + [of.additional_values for of in (operands, tangents)]
        + [grad_output, tangent_grad_output]
    )
    grad_moves = tangent_grad_output is not None
    for pass_ in passes(problem):
        by_keys = pass_.rows_are_keys
        made = (gradients.key, gradients.value) if by_keys else (gradients.query, None)
        # Both vectors of the rows, and of the columns
        vectors = [
            (of.key, of.value, of.query, grad) if by_keys else (of.query, grad, of.key, of.value)
            for of, grad, _ in both
        ]
        plan = plan_of(program, problem, pass_, [*vectors[0], *vectors[1], *made], mask)
        if isinstance(plan, SmallPlan):  # `HvpArguments` of cuda/fused/small/hvp.cu
            arrays = mask_of(problem, operands)
            for each, (_, _, numbers) in zip(vectors, both, strict=True):
                arrays += [*((array, "vectors") for array in each), (numbers, "pairs")]
            arrays += ((array, "vectors") for array in made)
            for array in (tangent_lse, results.lse, incoming.lse, tangents_incoming.lse):
                given = None if by_keys else small.readable_numbers(array, program)
                arrays.append((given, "scalars"))
            small.launch(program, problem, pass_, plan, arrays, grad_moves)
            if not by_keys and tangent_output is not None:
                moved = JvpResults(tangent_output=tangent_output)
                jvp(problem.but("jvp"), operands, tangents, moved, program)
            continue
        assert isinstance(plan, FusedPlan), "there is no other kernel for it"
        if not by_keys:  # the kernels for small windows compute the statistics themselves
            if tangent_output is None:
                tangent_output = program.allocate(*problem.output)
            moved = JvpResults(tangent_output=tangent_output, tangent_lse=tangent_lse)
            jvp(problem.but("jvp"), operands, tangents, moved, program)
            sums.hvp_delta(
                problem,
                OfResults(grad_output, incoming.lse),
                OfResults(tangent_grad_output, tangents_incoming.lse),
                OfResults(readable(results.output, program), results.lse),
                OfResults(tangent_output, tangent_lse),
                (statistics, tangent_statistics),
                program,
            )
        views = Views(problem.rank)  # `HvpArguments` of cuda/fused/hvp.cu
        views.mask(mask)
        for each, (of, _, numbers) in zip(vectors, both, strict=True):
            views.vectors(*each)
            if by_keys:
                views.additional(None, None)
            else:
                views.additional(of.additional_keys, of.additional_values)
            views.bias(of.rpb)
            views.pairs(numbers)
        views.vectors(*made)
        launch_pass(program, problem, pass_, plan, key_bytes, value_bytes, views, grad_moves)

    of_rows = HvpArrays(
        *(operands, tangents, grad_output, tangent_grad_output),
        *(results.lse, tangent_lse),
        *(statistics.component(1), tangent_statistics.component(1)),
    )
    sums.hvp_gradients(problem, of_rows, gradients, program)


def _alike(operands: Operands, tangents: Operands, program: Program) -> tuple[Operands, Operands]:
    """The same, with the tangents of all but the query laid out in memory as what they are of."""
    pairs = [
        (array, tangent) if name == "query" else _alike_in_memory(array, tangent, program)
        for name, array, tangent in zip(Operands._fields, operands, tangents, strict=True)
    ]
    made, moved = zip(*pairs, strict=True)
    return Operands(*made), Operands(*moved)


def _alike_in_memory(
    array: Array | None, tangent: Array | None, program: Program
) -> tuple[Any, Any]:
    """The same, laid out in memory alike: contiguous, unless they are so already."""
    if array is None or tangent is None or array.strides == tangent.strides:
        return array, tangent
    wanted = contiguous(array.shape)
    return (
        array if array.strides == wanted else program.copied(array),
        tangent if tangent.strides == wanted else program.copied(tangent),
    )
