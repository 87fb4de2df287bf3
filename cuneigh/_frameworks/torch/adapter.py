"""The adapter of PyTorch: what `tensors` has, and how calls are differentiated and traced.

A call that PyTorch must see is recorded by a function of `autograd` if it is eager, and by an
operator of `operators` where PyTorch compiles, transforms or counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from cuneigh._call import Call
from cuneigh._frameworks.torch import operators
from cuneigh._frameworks.torch.autograd import differentiable, recorded
from cuneigh._frameworks.torch.tensors import (
    DEVICES,
    PLAIN,
    TRACED,
    TensorAdapter,
    is_recorded,
    not_recorded,
)
from cuneigh._problem import ARRAYS


class TorchAdapter(TensorAdapter):
    """PyTorch tensors in a program that may have to be differentiated or traced."""

    def cast_automatically(self, call: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Under autocast, as ``scaled_dot_product_attention`` would take them.

        A relative positional bias of float32 goes with queries of any dtype, and stays.
        """
        kind = next(iter(arrays.values())).device.type
        if not torch.is_autocast_enabled(kind) or call.endswith("_backward"):
            return arrays
        dtype = torch.get_autocast_dtype(kind)
        return {
            name: array.to(dtype)
            if array.dtype in _CAST and not (name == "rpb" and array.dtype is torch.float32)
            else array
            for name, array in arrays.items()
        }

    def signature(self, arrays: Sequence[torch.Tensor | None]) -> tuple[Any, ...] | None:
        if is_recorded():
            with not_recorded():
                return self.signature(arrays)
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
        if torch.is_grad_enabled():
            for array in arrays:
                if array.requires_grad:
                    return True
        return forward_ad._current_level >= 0 or is_recorded() or _is_traced(arrays)

    def record(self, call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        is_gradient = ARRAYS[call.problem.operation].gradient is None
        if is_gradient or forward_ad._current_level >= 0:
            _refuse_lost_derivatives(call, arrays, is_gradient)
        if is_recorded():
            return recorded(call, arrays)
        if not _is_traced(arrays):
            return differentiable(call, arrays)
        made = operators.call(call, arrays)
        return [
            None if spec is None else array for spec, array in zip(call.results, made, strict=True)
        ]


_CAST = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that autocast converts."""


def _refuse_lost_derivatives(call: Call, arrays: Sequence[torch.Tensor], is_gradient: bool) -> None:
    """Raise for an array that would lose a derivative, which a gradient does in either mode."""
    for name, array in zip(call.arguments, arrays, strict=True):
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(array).tangent is not None:
            raise RuntimeError(
                f"{call.name}: {name} takes part in automatic differentiation in forward mode, "
                f"which {call.name} does not support; differentiate in reverse mode"
            )
        if is_gradient and array.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{call.name}: {name} takes part in automatic differentiation, through which "
                f"{call.name} cannot pass a second derivative: call it under torch.no_grad() or on "
                f"{name}.detach()"
            )


def _is_traced(arrays: Sequence[torch.Tensor]) -> bool:
    """Whether PyTorch must see an operator: it compiles, transforms, did so or counts."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    for array in arrays:
        if type(array) in TRACED or torch._C._functorch.is_functorch_wrapped_tensor(array):
            return True
    return False


ADAPTER = TorchAdapter()
