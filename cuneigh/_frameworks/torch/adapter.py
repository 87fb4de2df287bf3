"""The adapter of PyTorch: what `tensors` has, and how calls are differentiated and traced.

A call that PyTorch must see is recorded by a function of `autograd` if it is eager, and by an
operator of `operators` where PyTorch compiles, transforms or counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cuneigh._call import Call
from cuneigh._frameworks.derivatives import composed, is_composed
from cuneigh._frameworks.torch import operators
from cuneigh._frameworks.torch.autograd import differentiable, run
from cuneigh._frameworks.torch.derivatives import (
    RECORDING,
    calculus_of,
    in_one_pass,
    is_forward_mode,
    is_mapped,
    mapped,
    split,
)
from cuneigh._frameworks.torch.tensors import DEVICES, PLAIN, TensorAdapter
from cuneigh._problem import ARRAYS


class TorchAdapter(TensorAdapter):
    """PyTorch tensors in a program that may have to be differentiated or traced."""

    def converted(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Under autocast, as ``scaled_dot_product_attention`` would take them.

        A relative positional bias of float32 goes with queries of any dtype, and stays.
        """
        kind = next(iter(arrays.values())).device.type
        if kind not in DEVICES or not torch.is_autocast_enabled(kind) or call.endswith(_NOT_CAST):
            return arrays
        dtype = torch.get_autocast_dtype(kind)
        return {
            name: array.to(dtype)
            if array.dtype in _CAST and not (name == "rpb" and array.dtype is torch.float32)
            else array
            for name, array in arrays.items()
        }

    def signature(self, arrays: Sequence[torch.Tensor | None]) -> tuple[Any, ...] | None:
        if torch._C._get_tracing_state() is not None:  # then sizes are tensors
            return None
        found: list[Any] = []
        for array in arrays:
            if array is None:
                found.append(None)
            elif type(array) not in PLAIN or array.is_nested:
                return None
            else:
                found += array.shape, array.dtype, array.layout, array.device
        kind = found[3].type
        if kind not in DEVICES or torch.is_autocast_enabled(kind):
            return None
        return tuple(found)

    def watches(self, arrays: Sequence[torch.Tensor]) -> bool:
        return (
            _requires_grad(arrays)
            or is_forward_mode()
            or torch.autograd._profiler_enabled()
            or _is_traced(arrays)
        )

    def record(self, call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        if any(map(is_mapped, arrays)):
            return mapped(lambda *given: call.compute(given), arrays)
        if is_forward_mode():
            named = dict(zip(call.arguments, arrays, strict=True))
            primals, moved = split(named)
            operation = call.problem.operation
            calculus = calculus_of(call.name, call.backend, arrays[0].device)
            if moved and is_composed(operation, call.follows, forwards=True):
                of = composed(call.problem, named, calculus)
                return [of.get(name) for name in ARRAYS[operation].results]
            # Where gradients are asked for, too, they must see the tangents of what is kept.
            if moved and operation == "forward" and not _requires_grad(arrays):
                return in_one_pass(call, primals, moved, calculus)
        if not _is_traced(arrays):
            recorded = _requires_grad(arrays) or is_forward_mode()
            return (differentiable if recorded else run)(call, arrays)
        made = operators.call(call, arrays)
        return [
            None if spec is None else array for spec, array in zip(call.results, made, strict=True)
        ]


_NOT_CAST = ("_backward", "merge_attentions")
"""How the calls end whose arguments autocast leaves as they are: they were cast before."""

_CAST = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that autocast converts."""


def _requires_grad(arrays: Sequence[torch.Tensor]) -> bool:
    if torch.is_grad_enabled():
        for array in arrays:
            if array.requires_grad:
                return True
    return False


def _is_traced(arrays: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch must see an operator: it compiles, traces, transforms, did so or counts.

    Tensors of other types and those without numbers are for PyTorch to deal with as well.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for array in arrays:
        if type(array) not in PLAIN or array.is_meta:
            return True
        if torch._C._functorch.is_functorch_wrapped_tensor(array) or is_mapped(array):
            return True
    return False


ADAPTER = TorchAdapter()
RECORDING.append(ADAPTER)
