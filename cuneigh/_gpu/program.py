"""The launches of a call, recorded for all calls whose arrays differ in their addresses alone.

A backend is asked once. It is given `Array`s, of which everything is known but their addresses, and
adds launches to a `Program`. From then on a call runs the program with the addresses of its arrays:
what the backend decides and computes in Python takes the host far longer than launching does.

Recording needs no GPU and no compiler. All kernels of a program are compiled side by side, and
loaded, when the recording is complete.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cuneigh import _jit
from cuneigh._device import Device
from cuneigh._gpu.arrays import Array, Pointer, contiguous
from cuneigh._gpu.tensor_map import Encoded, Encoder, TensorMap
from cuneigh._problem import Spec

Step = Callable[[Sequence[int], int], None]
"""Something to launch, given the addresses of all arrays and a stream."""


class Record(NamedTuple):
    """A record some words of which are known when a program runs."""

    values: npt.NDArray[Any]
    words: tuple[tuple[int, Pointer], ...] = ()
    """(Number of a 64-bit word, which of the numbers of a run replaces it)."""


Parameter = npt.NDArray[Any] | Record | Sequence[int | Pointer] | TensorMap
"""An argument that a kernel takes by value: a record, 64-bit words, or a tensor map."""


class Recorded(Protocol):
    """Something to launch that may have to be loaded first."""

    def load(self, device: Device) -> Step: ...


class Program:
    """Launches in their order, and the arrays between them; immutable once a backend returns."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.workspace: list[Spec] = []
        """Arrays to allocate for each run, contiguous; their addresses follow all others."""
        self._arrays = 0
        self._recorded: list[Recorded] = []
        self._until_keys: int | None = None
        """How many of them the gradients of keys and values take, if others follow."""
        self._steps: list[Step] = []
        """What is recorded, loaded."""

    def run(
        self,
        addresses: Sequence[int],
        stream: int,
        after_keys: Callable[[], None] | None = None,
    ) -> None:
        """Launch everything on the CUDA stream `stream`; the device is current.

        `addresses` are those of arguments, results and workspace, in the order in which these were
        added, and after them the words that records take (`cuneigh._gpu.records.start_words`). All
        memory must stay as it is until the stream has come that far. `after_keys` is called where
        the backend has said `keys_are_complete`, and not at all if it has not.
        """
        steps = self._steps or self.load()
        if after_keys is not None and self._until_keys is not None:
            for step in steps[: self._until_keys]:
                step(addresses, stream)
            after_keys()
            steps = steps[self._until_keys :]
        for step in steps:
            step(addresses, stream)

    @property
    def kernels(self) -> list[_jit.Kernel]:
        """The kernels that are launched, each once."""
        launches = (each for each in self._recorded if isinstance(each, Launch))
        return list(dict.fromkeys(launch.kernel for launch in launches))

    @property
    def is_loaded(self) -> bool:
        """Whether it has run, or is empty: nothing is left to compile."""
        return len(self._steps) == len(self._recorded)

    def compile(self) -> None:
        """Have all kernels that are not there yet compiled in the background, side by side."""
        _jit.start(self.kernels, self.device)

    def load(self) -> list[Step]:
        """Wait for the kernels and load them; from then on a run only launches."""
        self.compile()
        self._steps = [each.load(self.device) for each in self._recorded]
        return self._steps

    # What a backend adds to it

    def array(
        self, spec: Spec, strides: tuple[int, ...] | None = None, misalignment: int = 0
    ) -> Array:
        """The next argument or result; contiguous and at a multiple of 16 unless said otherwise.

        `strides` count elements.
        """
        if strides is None:
            strides = contiguous(spec.shape)
        self._arrays += 1
        return Array(Pointer(self._arrays - 1), *spec, strides, misalignment)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Workspace for one run, contiguous and uninitialized."""
        self.workspace.append(Spec(shape, dtype))
        return self.array(self.workspace[-1])

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Workspace for one run, contiguous, whose elements are 0 when the launches after come."""
        made = self.allocate(shape, dtype)
        self._recorded.append(_Clear(made))
        return made

    def launch(
        self,
        kernel: _jit.Kernel,
        grid: tuple[int, int],
        threads: int,
        *parameters: Parameter,
        shared_bytes: int = 0,
    ) -> None:
        """Add the launch of a kernel: `grid` blocks along x and y, `threads` threads in each.

        Each of `parameters` is one argument of the kernel: the address of an array is
        ``[array.pointer]``, and several words are the members of one struct. A grid without blocks
        is no launch.
        """
        if 0 in grid:
            return
        self._recorded.append(Launch(kernel, grid, threads, parameters, shared_bytes))

    def keys_are_complete(self) -> None:
        """Say that what was added until now fills the gradients of keys and values.

        Who waits for these gradients is then told before the rest is launched.
        """
        self._until_keys = len(self._recorded)

    def add(self, step: Step) -> None:
        """Add anything that can be launched and needs no kernel of ours."""
        self._recorded.append(_Loaded(step))

    def copied(self, source: Array) -> Array:
        """A contiguous copy."""
        target = self.allocate(source.shape, source.dtype)
        self.add(_Copy(source, target, self.device.index))
        return target


class _Loaded(NamedTuple):
    """A step that is ready as it is."""

    step: Step

    def load(self, device: Device) -> Step:
        return self.step


@dataclass(frozen=True, eq=False)
class Launch:
    """The launch of a kernel as it was recorded."""

    kernel: _jit.Kernel
    grid: tuple[int, int]
    threads: int
    parameters: Sequence[Parameter]
    shared_bytes: int

    def load(self, device: Device) -> Step:
        function = _jit.load(self.kernel, device)
        if function.max_dynamic_shared_size_bytes < self.shared_bytes:
            function.max_dynamic_shared_size_bytes = self.shared_bytes
        size = (*self.grid, 1, self.threads, 1, 1, self.shared_bytes)
        return _Launch(function.kernel.ptr, size, self.parameters)


class _Launch:
    """One kernel and its parameters, as the driver takes them."""

    def __init__(
        self, function: int, size: tuple[int, ...], parameters: Sequence[Parameter]
    ) -> None:
        from cupy.cuda import driver

        self._launch = partial(driver.launchKernel, function, *size)
        # The frame holds the address of every parameter, then the parameters but for tensor maps.
        self._frame = array("q", bytes(8 * len(parameters)))
        self._starts: list[tuple[int, int]] = []
        """(Index of a parameter, byte of the frame where it begins)."""
        self._pointers: list[tuple[int, int, int]] = []
        """(Index of a word of the frame, slot, offset)."""
        maps: dict[TensorMap, list[int]] = {}
        for index, parameter in enumerate(parameters):
            if isinstance(parameter, TensorMap):
                maps.setdefault(parameter, []).append(index)
                continue
            first = len(self._frame)
            self._starts.append((index, 8 * first))
            if isinstance(parameter, Record):
                self._pointers += [(first + at, *word) for at, word in parameter.words]
                parameter = parameter.values
            if isinstance(parameter, np.ndarray):
                self._frame.frombytes(parameter.tobytes() + bytes(-parameter.nbytes % 8))
                continue
            for i, word in enumerate(parameter, first):
                if isinstance(word, Pointer):
                    self._pointers.append((i, *word))
                self._frame.append(0 if isinstance(word, Pointer) else word)
        self._maps: list[tuple[list[int], Callable[[int], Encoded], int, int]] = [
            (indices, Encoder(tensor_map).encode, *tensor_map.pointer)
            for tensor_map, indices in maps.items()
        ]
        """(Indices of equal parameters, what encodes them, slot, offset)."""

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        frame = self._frame[:]  # other threads may be launching this
        start, _ = frame.buffer_info()
        for index, byte in self._starts:
            frame[index] = start + byte
        for index, slot, offset in self._pointers:
            frame[index] = addresses[slot] + offset
        if not self._maps:
            self._launch(stream, start, 0)
            return
        held = []  # until the launch, after which a map that is not kept may go
        for indices, encode, slot, offset in self._maps:
            where, memory = encode(addresses[slot] + offset)
            for index in indices:
                frame[index] = where
            held.append(memory)
        self._launch(stream, start, 0)


class _Clear(NamedTuple):
    """Zeros for a contiguous array."""

    target: Array

    def load(self, device: Device) -> Step:
        from cupy.cuda import runtime

        clear, (slot, offset) = runtime.memsetAsync, self.target.pointer
        size = self.target.size * self.target.itemsize

        def step(addresses: Sequence[int], stream: int) -> None:
            clear(addresses[slot] + offset, 0, size, stream)

        return step


def cupy_stream(pointer: int) -> Any:
    """The CUDA stream at an address as CuPy's, which can be made the current one."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(pointer))


class _Stream(NamedTuple):
    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class _Copy:
    """The copy of an array of any layout, by CuPy."""

    def __init__(self, source: Array, target: Array, device: int) -> None:
        self._source, self._target, self._device = source, target, device

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        import cupy

        def bits(what: Array) -> Any:
            """What lies there, as integers: CuPy copies those of any layout."""
            address = addresses[what.pointer.slot] + what.pointer.offset
            memory = cupy.cuda.UnownedMemory(address, 0, None, self._device)
            start = cupy.cuda.MemoryPointer(memory, 0)
            return cupy.ndarray(what.shape, f"u{what.itemsize}", start, what.byte_strides)

        with cupy_stream(stream):
            bits(self._target)[...] = bits(self._source)
