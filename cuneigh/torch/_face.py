"""The face of PyTorch: its tensors as arguments and results of cuneigh's functions.

Results come from PyTorch's allocators, and kernels run on PyTorch's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from cuneigh import _device
from cuneigh._arrays import Memory, Watcher, import_cupy, numpy_dtype, refuse
from cuneigh._gpu.arrays import contiguous
from cuneigh._ops.call import Call
from cuneigh._problem import DTYPES, GRADIENT, Spec
from cuneigh.torch import _operators
from cuneigh.torch._autograd import differentiable

DEVICES = "cpu", "cuda"
PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])
TRACED = frozenset([FakeTensor, FunctionalTensor])
"""Tensors without numbers, by which PyTorch finds out what a program does."""


def _empty_strided(shape: tuple[int, ...], steps: tuple[int, ...], dtype: torch.dtype) -> Any:
    return torch.empty_strided(shape, steps, dtype=dtype, device="cuda")


# What the programs of torch.compile allocate with on the current device, at half the cost.
_empty_on_gpu: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


class TorchFace(Watcher):
    """PyTorch tensors. A place is a ``torch.device``."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in PLAIN and type(array) not in TRACED:
            refuse(call, name, array, "a plain torch.Tensor is needed")
        if array.layout is not torch.strided or array.is_nested:
            layout = "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
            raise TypeError(f"{call}: {name} is a {layout} tensor; a dense one is needed")
        if borrowed and array.device.type not in DEVICES:
            raise ValueError(f"{call}: {name} is on device {array.device}; cpu or cuda is needed")

    def spec(self, array: torch.Tensor) -> Spec:
        return _operators.spec_of(array)

    def place(self, array: torch.Tensor) -> torch.device:
        return array.device

    def device(self, place: torch.device) -> _device.Device:
        if place.type == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(place.index)

    def full(
        self, place: torch.device, shape: tuple[int, ...], dtype: str, value: float
    ) -> torch.Tensor:
        return torch.full(shape, value, dtype=getattr(torch, dtype), device=place)

    def operations(self, place: torch.device) -> AbstractContextManager[Any]:
        return nullcontext(torch)

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))

    # As one that gives memory

    def empty(self, place: torch.device, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=_DTYPES[dtype], device=place)

    def borrow(self, array: torch.Tensor) -> npt.NDArray[Any]:
        array = array.resolve_neg().detach()
        if array.dtype is torch.bfloat16:  # which NumPy does not have
            native: npt.NDArray[Any] = array.view(torch.int16).numpy()
            return native.view(numpy_dtype("bfloat16"))
        return array.numpy()  # type: ignore[no-any-return]

    def memory(self, arrays: Sequence[torch.Tensor]) -> Memory:
        addresses, layouts, kept = [], [], []
        for array in arrays:
            if array.is_neg():  # a pending change of sign, which nobody else can see
                array = array.resolve_neg()
            address = array.data_ptr()
            addresses.append(address)
            layouts.append((array.stride(), address % 16))
            kept.append(array)
        return addresses, tuple(layouts), kept

    def allocate(
        self, place: torch.device, specs: Sequence[Spec | None], addresses: list[int]
    ) -> list[torch.Tensor | None]:
        made = []
        for spec in specs:
            array = None
            if spec is not None:
                shape, dtype = spec
                array = _empty_on_gpu(shape, contiguous(shape), _DTYPES[dtype])
                addresses.append(array.data_ptr())
            made.append(array)
        return made

    def stream(self, place: torch.device) -> int:
        stream: int = torch._C._cuda_getCurrentRawStream(place.index)
        return stream

    # As a watcher

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

    def look(self, arrays: Sequence[torch.Tensor | None]) -> tuple[Any, ...] | None:
        looks: list[Any] = []
        for array in arrays:
            if array is None:
                looks.append(None)
            elif type(array) not in PLAIN or array.is_nested:
                return None
            else:
                looks += array.shape, array.dtype, array.layout, array.device
        kind = looks[3].type
        if kind not in DEVICES or torch.is_autocast_enabled(kind):
            return None
        return tuple(looks)

    def watches(self, arrays: Sequence[torch.Tensor]) -> bool:
        if torch.is_grad_enabled():
            for array in arrays:
                if array.requires_grad:
                    return True
        return forward_ad._current_level >= 0 or _is_traced(arrays)

    def record(self, call: Call, arrays: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        is_gradient = call.problem.operation not in GRADIENT
        if is_gradient or forward_ad._current_level >= 0:
            _refuse_lost_derivatives(call, arrays, is_gradient)
        if not _is_traced(arrays):
            return differentiable(call, arrays)
        made = _operators.call(call, arrays)
        return [
            None if spec is None else array for spec, array in zip(call.results, made, strict=True)
        ]


_DTYPES = {name: getattr(torch, name) for name in DTYPES}
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
