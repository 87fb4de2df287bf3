"""Every operation as an operator of PyTorch, ``torch.ops.cuneigh``, for whatever traces a program.

An operator takes the arrays by position, None where there is none, and then the parameters of the
problem. It has a fake kernel, which gives the shapes of its results, a rule for its derivative, a
rule for ``torch.func.vmap`` and a count of its floating point operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from cuneigh._call import Call
from cuneigh._frameworks.arguments import examine
from cuneigh._frameworks.derivatives import Calculus
from cuneigh._frameworks.torch.autograd import KEEPING
from cuneigh._frameworks.torch.derivatives import calculus_of, gradients, tangents
from cuneigh._frameworks.torch.tensors import TENSORS
from cuneigh._parameters import Part, Window
from cuneigh._problem import ARRAYS, OPTIONAL, Operation, Problem, of_what
from cuneigh._validate import problem_of
from cuneigh._window import BORDERS, Axis


class Parameters(NamedTuple):
    """What an operator takes besides arrays."""

    kernel_size: Sequence[int]
    """Empty for `attention`, which sees every key."""
    stride: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[int]
    """0 or 1, for torch.jit.trace cannot record a list of bools."""
    border: Sequence[int]
    """Positions in `BORDERS`; like the three below empty for `attention`, which has no part."""
    layout: Sequence[int]
    """Empty if it is that of the arrays, so that torch.compile need not tell it from theirs."""
    query_start: Sequence[int]
    key_start: Sequence[int]
    scale: float | None
    """None for the default, which torch.compile would otherwise compile anew for each head_dim."""
    backend: str | None
    follows: bool = False
    """As `Call.follows`."""


def call(public: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """The results of the call `public`, None where the operation has none, by an operator."""
    problem = public.problem
    axes = problem.axes
    parameters = Parameters(
        [] if public.name == "attention" else [axis.kernel_size for axis in axes],
        [axis.stride for axis in axes],
        [axis.dilation for axis in axes],
        [int(axis.is_causal) for axis in axes],
        *_part_parameters(public, axes),
        None if _is_default_scale(problem) else problem.scale,
        public.backend,
        public.follows,
    )
    return apply(problem.operation, dict(zip(public.arguments, arrays, strict=True)), parameters)


def _part_parameters(
    public: Call, axes: Sequence[Axis]
) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    """`border`, `layout`, `query_start` and `key_start` of `Parameters`."""
    if public.name == "attention":
        return [], [], [], []
    is_part = any(axis.is_part for axis in axes)
    return (
        [BORDERS.index(axis.border) for axis in axes],
        [axis.layout for axis in axes] if is_part else [],
        [axis.query_start for axis in axes],
        [axis.key_start for axis in axes],
    )


def _is_default_scale(problem: Problem) -> bool:
    """Whether the scale follows from head_dim, with which it is to change."""
    if problem.operation not in ("forward", "backward", "jvp", "hvp"):
        return False
    if isinstance(problem.scale, torch.SymFloat):  # any other has become a number in the checks
        return True
    return type(problem.head_dim) is int and problem.scale == problem.head_dim**-0.5


def apply(
    operation: Operation, arrays: dict[str, torch.Tensor], parameters: Parameters
) -> list[torch.Tensor | None]:
    """The results of `operation`, None for the gradient of what was not given."""
    transformed = torch._C._are_functorch_transforms_active()
    perform = (_FUNCTIONS if transformed else _OPERATORS)[operation]
    made = perform(*map(arrays.get, ARRAYS[operation].arguments), *parameters)
    if isinstance(made, torch.Tensor):
        return [made]
    named = dict(zip(_given_results(operation, arrays), made, strict=True))
    return [named.get(name) for name in ARRAYS[operation].results]


def _given_results(operation: Operation, arrays: dict[str, Any]) -> list[str]:
    """The names of the tensors that the operator of `operation` returns."""
    results = ARRAYS[operation].results
    if not _has_gradients(operation):
        return list(results)
    return [name for name in results if arrays.get(of_what(name)) is not None]


def _has_gradients(operation: Operation) -> bool:
    """Whether the results are gradients of arguments, of which some may not be given."""
    return operation == "hvp" or operation.endswith("backward")


def _problem(operation: Operation, arrays: dict[str, Any], parameters: Parameters) -> Problem:
    """The problem of an operator's arguments, all of them checked."""
    kernel_size, stride, dilation, is_causal, border, layout, *starts = parameters[:8]
    window = Window(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(map(bool, is_causal)))
    part = None
    if border:
        names = tuple(BORDERS[number] for number in border)
        part = Part(names, tuple(layout) or None, *map(tuple, starts))
    specs = {name: TENSORS.spec(array) for name, array in arrays.items()}
    return problem_of(f"cuneigh::{operation}", operation, specs, window, parameters.scale, part)


# The rules of one operator


def _split(operation: Operation, args: Sequence[Any]) -> tuple[dict[str, Any], Parameters]:
    """The arguments of an operator: the arrays that are given, by name, and the parameters."""
    names = ARRAYS[operation].arguments
    arrays = {name: array for name, array in zip(names, args, strict=False) if array is not None}
    return arrays, Parameters(*args[len(names) :])


def _joined(operation: Operation, results: list[Any]) -> Any:
    """What the operator of `operation` returns: one tensor, a tuple, or a list of gradients."""
    if _has_gradients(operation):
        return results
    return results[0] if len(results) == 1 else tuple(results)


def _kernel(operation: Operation) -> Callable[..., Any]:
    """What the operator does with tensors that have numbers."""

    def kernel(*args: Any) -> Any:
        arrays, parameters = _split(operation, args)
        problem = _problem(operation, arrays, parameters)
        name = f"cuneigh::{operation}"
        _, device = examine(name, arrays, lambda *_: TENSORS)
        backend, results = parameters.backend, problem.results
        call = Call(name, TENSORS, device, tuple(arrays), problem, backend, results)
        with torch.no_grad():
            made = call.run(tuple(arrays.values()))
        return _joined(operation, [array for array in made if array is not None])

    return kernel


def _fake_kernel(operation: Operation) -> Callable[..., Any]:
    """What the operator does with tensors that have only shapes and dtypes."""

    def kernel(*args: Any) -> Any:
        arrays, parameters = _split(operation, args)
        problem = _problem(operation, arrays, parameters)
        device = next(iter(arrays.values())).device
        results = [TENSORS.empty(device, *spec) for spec in problem.results if spec is not None]
        return _joined(operation, results)

    return kernel


def _calculus(
    operation: Operation,
    arrays: dict[str, torch.Tensor],
    parameters: Parameters,
    follows: bool = True,
) -> Calculus:
    """For derivatives of the operator, as those of the public function that has the operation."""
    suffix = f"_{operation}" if operation.endswith(("backward", "qk", "av")) else ""
    rank = len(parameters.kernel_size)
    name = f"na{rank}d{suffix}" if rank else "attention"
    return calculus_of(name, parameters.backend, next(iter(arrays.values())).device, follows)


Rule = Callable[..., Any]


def _derivatives(operation: Operation) -> tuple[Rule, Rule, Rule]:
    """What the operator keeps for its derivatives, its gradient and its tangent."""
    kept = ARRAYS[operation].results if operation in KEEPING else ()
    names = ARRAYS[operation].arguments

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        made = [output] if isinstance(output, torch.Tensor) else output
        ctx.save_for_backward(*inputs[: len(names)], *(made if kept else ()))
        ctx.save_for_forward(*inputs[: len(names)], *made)
        ctx.parameters = Parameters(*inputs[len(names) :])
        ctx.set_materialize_grads(False)

    def saved(ctx: Any) -> tuple[dict[str, Any], dict[str, Any], Problem, Calculus]:
        tensors = ctx.saved_tensors
        pairs = zip(names, tensors, strict=False)
        arrays = {name: array for name, array in pairs if array is not None}
        pairs = zip(_given_results(operation, arrays), tensors[len(names) :], strict=False)
        problem = _problem(operation, arrays, ctx.parameters)
        return arrays, dict(pairs), problem, _calculus(operation, arrays, ctx.parameters)

    def backward(ctx: Any, *incoming: torch.Tensor | Sequence[torch.Tensor | None] | None) -> Any:
        arrays, results, problem, calculus = saved(ctx)
        if incoming and isinstance(incoming[0], (list, tuple)):  # of an operator with a list
            incoming = tuple(incoming[0])
        given = dict(zip(_given_results(operation, arrays), incoming, strict=True))
        nothing = (None,) * (len(names) + len(Parameters._fields))
        if all(array is None for array in given.values()):
            return nothing
        pairs = zip(names, ctx.needs_input_grad, strict=False)
        needed = [name for name, needs in pairs if needs and name in arrays]
        follows = ctx.parameters.follows
        made = gradients(problem, arrays, results, given, needed, calculus, follows)
        back = [made.get(name) if name in needed else None for name in names]
        return (*back, *nothing[len(names) :])

    def tangent(ctx: Any, *moved: torch.Tensor | None) -> Any:
        arrays, results, problem, calculus = saved(ctx)
        given = dict(zip(names, moved, strict=False))
        made = tangents(problem, arrays, results, given, calculus, ctx.parameters.follows)
        turned = tuple(made.get(name) for name in _given_results(operation, arrays))
        return turned[0] if len(turned) == 1 and not _has_gradients(operation) else turned

    return setup, backward, tangent


Fold = Literal["batch", "heads"]
"""The axis that takes up the one that is mapped over."""


def _batched(operation: Operation) -> Callable[..., Any]:
    """The rule for ``torch.func.vmap``: many calls are one with a larger batch, or more heads."""

    def batched(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        arrays, parameters = _split(operation, args)
        names = ARRAYS[operation].arguments
        dims = dict(zip(names, in_dims, strict=False))
        # The batch takes up the mapped axis without moving anything. But a bias is shared by the
        # whole batch, and its gradient is a sum over the batch: where each call has its own, the
        # heads take up the axis.
        moves = any(dims.get(name) is not None for name in ("rpb", "tangent_rpb"))
        own_bias = "rpb" in arrays and (moves or _has_gradients(operation))
        into: Fold = "heads" if own_bias else "batch"
        if own_bias and dims.get("key_mask") is not None:  # which heads share
            return one_by_one(info.batch_size, arrays, dims, parameters)
        folded = {
            name: _fold(array, _axis(name, array, dims[name], into), dims[name], info.batch_size)
            for name, array in arrays.items()
        }
        made = _calculus(operation, folded, parameters, parameters.follows).apply(
            _problem(operation, folded, parameters), folded
        )
        results = [
            _unfold(array, _axis(name, array, None, into), info.batch_size)
            for name, array in made.items()
            if array is not None
        ]
        return _joined(operation, results), _joined(operation, [0] * len(results))

    def one_by_one(
        size: int, arrays: dict[str, Any], dims: dict[str, int | None], parameters: Parameters
    ) -> Any:
        each = [
            apply(
                operation,
                {n: a if dims[n] is None else a.select(dims[n], i) for n, a in arrays.items()},
                parameters,
            )
            for i in range(size)
        ]
        results = [torch.stack(made) for made in zip(*each, strict=True) if made[0] is not None]
        return _joined(operation, results), _joined(operation, [0] * len(results))

    return batched


def _axis(name: str, array: torch.Tensor, dim: int | None, into: Fold) -> int | None:
    """The axis, in an array without its mapped axis `dim`, that takes up the latter."""
    if of_what(name) == "rpb":
        return 0 if into == "heads" else None
    if into == "batch":
        return 0
    if name == "key_mask":  # it is that of all heads
        return None
    ndim: int = array.ndim - (dim is not None)
    return ndim - (1 if of_what(name) == "lse" else 2)


def _fold(array: torch.Tensor, axis: int | None, dim: int | None, size: int) -> torch.Tensor:
    """`array` with its mapped axis `dim`, of length `size`, merged into `axis`."""
    if axis is None:
        return array
    array = array.expand(size, *array.shape) if dim is None else array.movedim(dim, 0)
    return array.movedim(0, axis).flatten(axis, axis + 1)


def _unfold(array: torch.Tensor, axis: int | None, size: int) -> torch.Tensor:
    """The opposite of `_fold`; the mapped axis becomes the first."""
    assert axis is not None, "a bias that stays as it is has no gradient among the results"
    return array.unflatten(axis, (size, array.shape[axis] // size)).movedim(axis, 0)


def _flops(operation: Operation) -> Callable[..., int]:
    """The count of floating point operations, for PyTorch's counter."""

    def flops(*args: Any, out_val: Any = None, **_: Any) -> int:
        arrays, parameters = _split(operation, args)
        return _problem(operation, arrays, parameters).flops()

    return flops


def _function(operation: Operation) -> Callable[..., Any]:
    """The operator for ``torch.func``, which differentiates no operator but such a function."""
    batched = _batched(operation)

    def forward(*args: Any) -> Any:
        made = _OPERATORS[operation](*args)
        return tuple(made) if isinstance(made, list) else made

    def vmap(*args: Any) -> Any:
        results, dims = batched(*args)
        return (tuple(results), tuple(dims)) if isinstance(results, list) else (results, dims)

    setup, backward, tangent = _derivatives(operation)
    rules = {"forward": forward, "setup_context": setup, "backward": backward, "vmap": vmap}
    rules["jvp"] = tangent
    name = f"cuneigh_{operation}"
    functions = {rule: staticmethod(function) for rule, function in rules.items()}
    function: Any = type(name, (torch.autograd.Function,), functions)
    apply: Callable[..., Any] = function.apply
    return apply


def _define(operation: Operation) -> Any:
    """Register the operator of `operation`, with all of its rules."""
    arrays = [f"Tensor{'?' * (name in OPTIONAL)} {name}" for name in ARRAYS[operation].arguments]
    parameters = [
        *("SymInt[] kernel_size", "SymInt[] stride", "SymInt[] dilation", "int[] is_causal"),
        *("int[] border", "SymInt[] layout", "SymInt[] query_start", "SymInt[] key_start"),
        *("float? scale", "str? backend", "bool follows=False"),
    ]
    operator = torch.library.custom_op(
        f"cuneigh::{operation}",
        _kernel(operation),
        mutates_args=(),
        schema=f"({', '.join(arrays + parameters)}) -> {_RETURNED.get(operation, 'Tensor[]')}",
    )
    operator.register_fake(_fake_kernel(operation))
    operator.register_vmap(_batched(operation))
    setup, backward, _ = _derivatives(operation)
    operator.register_autograd(backward, setup_context=setup)
    packet = getattr(torch.ops.cuneigh, operation)
    register_flop_formula(packet, get_raw=True)(_flops(operation))
    return packet


_RETURNED = {
    "forward": "(Tensor, Tensor)",
    "jvp": "(Tensor, Tensor, Tensor, Tensor)",
    "qk": "Tensor",
    "av": "Tensor",
}
"""What operators return; those that are not here return a list, of gradients."""

_OPERATORS = {operation: _define(operation) for operation in ARRAYS}
_FUNCTIONS = {operation: _function(operation) for operation in ARRAYS}
