"""From the arguments of a public function to its results: all of them but `merge_attentions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuneigh._call import Call, opaque, results_of
from cuneigh._frameworks import adapter_of
from cuneigh._frameworks.arguments import examine
from cuneigh._ops.scale import is_number, scaled
from cuneigh._parameters import (
    Window,
    boolean,
    finite_scale,
    part_arguments,
    scale_or_default,
    window_arguments,
)
from cuneigh._problem import ARRAYS, OPTIONAL, STARTS
from cuneigh._validate import problem_of


@opaque
def compute(parameters: tuple[Any, ...], *arrays: Any) -> list[Any]:
    """The results of a call of a public function, None for those that are not wanted.

    `arrays` has an element for each argument of the operation in the order of `ARRAYS`, None where
    it is not given. `parameters` are

        operation, rank, kernel_size, stride, dilation, is_causal, scale, return_lse, backend,
        border, layout, query_start, key_start

    where a rank of 0 stands for `attention`, which has `NO_PART` in place of the last four.
    """
    if is_number(parameters[SCALE]):
        return results_of(parameters, arrays, _examine)

    def compute_with(scale: Any, arrays: Sequence[Any]) -> list[Any]:
        given = (*parameters[:SCALE], scale, *parameters[SCALE + 1 :])
        return results_of(given, arrays, _examine)

    name = _name(parameters)
    return scaled(name, parameters[0], parameters[SCALE], arrays, compute_with)


SCALE = 6
"""The position of `scale` among the parameters."""

NO_PART = (None,) * 4


def _name(parameters: tuple[Any, ...]) -> str:
    """The name of the public function."""
    operation, rank = parameters[:2]
    suffix = {"forward": ""}.get(operation, f"_{operation}")
    return f"na{rank}d{suffix}" if rank else "attention"


def _examine(parameters: tuple[Any, ...], arrays: Sequence[Any]) -> tuple[Call, Sequence[Any]]:
    """The call of a public function, all of whose arguments are checked here, and its arrays."""
    operation, rank, kernel_size, stride, dilation, is_causal, scale, return_lse = parameters[:8]
    backend, border, layout, *starts = parameters[8:]
    name = _name(parameters)
    named = zip(ARRAYS[operation].arguments, arrays, strict=True)
    needed = {n: array for n, array in named if array is not None or n not in OPTIONAL}
    adapter, device = examine(name, needed, adapter_of)
    given = adapter.converted(name, needed)
    specs = {n: adapter.spec(array) for n, array in given.items()}
    if rank:
        window = window_arguments(name, rank, kernel_size, stride, dilation, is_causal)
        known, told = adapter.starts(rank, starts)
        part = part_arguments(name, rank, border, layout, *known)
        if told is not None:
            if layout is None:
                raise ValueError(
                    f"{name}: query_start and key_start need layout, the lengths of the whole"
                )
            given[STARTS] = told
    else:
        part = None
        window = Window((), (1,), (1,), (boolean(name, "is_causal", is_causal),))
    check_scale = finite_scale if operation in ("qk", "qk_backward") else scale_or_default
    problem = problem_of(name, operation, specs, window, check_scale(name, scale), part)
    results = problem.results
    if operation == "forward" and not boolean(name, "return_lse", return_lse):
        results = problem.output, None
    call = Call(name, adapter, device, tuple(given), problem, backend, results)
    return call, tuple(given.values())
