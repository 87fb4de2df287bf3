"""Tensors as arguments and results: their shapes, devices and memory.

Results come from PyTorch's allocators, and kernels run on PyTorch's current stream. Nothing here
differentiates or traces; `adapter` adds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from cuneigh import _device
from cuneigh._frameworks.contract import Adapter, Memory, import_cupy, numpy_dtype, refuse
from cuneigh._gpu.arrays import contiguous
from cuneigh._problem import DTYPES, Spec

DEVICES = "cpu", "cuda"
PLAIN = frozenset([torch.Tensor, torch.nn.Parameter])
TRACED = frozenset([FakeTensor, FunctionalTensor])
"""Tensors without numbers, by which PyTorch finds out what a program does."""

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def _empty_strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Any:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# What the programs of torch.compile allocate with on the current device, at half the cost.
_empty_on_gpu: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)


def is_recorded() -> bool:
    """Whether torch.jit.trace records what is called."""
    return torch._C._get_tracing_state() is not None


@contextmanager
def not_recorded() -> Iterator[None]:
    """Where sizes are ints; torch.jit.trace makes tensors of them."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


class TensorAdapter(Adapter):
    """PyTorch tensors. The own device is a ``torch.device``."""

    def check(self, call: str, name: str, array: Any, *, borrowed: bool) -> None:
        if type(array) not in PLAIN and type(array) not in TRACED:
            refuse(call, name, array, "a plain torch.Tensor is needed")
        if array.layout is not torch.strided or array.is_nested:
            layout = "nested" if array.is_nested else str(array.layout).removeprefix("torch.")
            raise TypeError(f"{call}: {name} is a {layout} tensor; a dense one is needed")
        if borrowed and array.device.type not in DEVICES:
            raise ValueError(f"{call}: {name} is on device {array.device}; cpu or cuda is needed")

    def spec(self, array: torch.Tensor) -> Spec:
        if is_recorded():
            with not_recorded():
                return self.spec(array)
        dtype = array.dtype
        return Spec(tuple(array.shape), DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch."))

    def own_device(self, array: torch.Tensor) -> torch.device:
        return array.device

    def device(self, own: torch.device) -> _device.Device:
        if own.type == "cpu":
            return _device.CPU
        import_cupy()
        return _device.cuda(own.index)

    def full(
        self, own: torch.device, shape: tuple[int, ...], dtype: str, value: float
    ) -> torch.Tensor:
        return torch.full(shape, value, dtype=TORCH_DTYPES[dtype], device=own)

    def operations(self, own: torch.device) -> AbstractContextManager[Any]:
        return nullcontext(torch)

    def cast(self, array: torch.Tensor, dtype: str) -> torch.Tensor:
        return array.to(TORCH_DTYPES[dtype])

    def empty(self, own: torch.device, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=own)

    def borrow(self, array: torch.Tensor) -> npt.NDArray[Any]:
        array = array.resolve_neg().detach()
        if array.dtype is torch.bfloat16:  # which NumPy does not have
            native: npt.NDArray[Any] = array.view(torch.int16).numpy()
            return native.view(numpy_dtype("bfloat16"))
        return array.numpy()  # type: ignore[no-any-return]

    def memory(self, arrays: Sequence[torch.Tensor]) -> Memory:
        addresses, layouts, owners = [], [], []
        for array in arrays:
            if array.is_neg():  # a pending change of sign, which nobody else can see
                array = array.resolve_neg()
            address = array.data_ptr()
            addresses.append(address)
            layouts.append((array.stride(), address % 16))
            owners.append(array)
        return addresses, tuple(layouts), owners

    def allocate(
        self, own: torch.device, specs: Sequence[Spec | None], addresses: list[int]
    ) -> list[torch.Tensor | None]:
        made = []
        for spec in specs:
            array = None
            if spec is not None:
                shape, dtype = spec
                array = _empty_on_gpu(shape, contiguous(shape), TORCH_DTYPES[dtype])
                addresses.append(array.data_ptr())
            made.append(array)
        return made

    def stream(self, own: torch.device) -> int:
        stream: int = torch._C._cuda_getCurrentRawStream(own.index)
        return stream


TENSORS = TensorAdapter()
