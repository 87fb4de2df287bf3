"""Programs of launches, with a driver that only notes what it is asked to launch."""

from __future__ import annotations

import ctypes
import dataclasses
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.cubin import parameter_sizes
from helpers.hopper import supported
from helpers.kernel_parameters import check_sizes
from helpers.strategies import problems
from helpers.toy_kernel import needs_nvrtc
from hypothesis import given
from hypothesis import strategies as st

from cuneigh import _device, _jit, _programs
from cuneigh._backends import BACKENDS, fused, gemm, hopper, naive
from cuneigh._backends.hopper.forms import forms_of
from cuneigh._backends.hopper.plan import ways
from cuneigh._gpu.arrays import Array, Pointer, contiguous
from cuneigh._gpu.program import Launch, Program, Record, _Clear
from cuneigh._gpu.records import PART_AXIS, start_words
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._gpu.views import Views, load_width
from cuneigh._parameters import window_arguments
from cuneigh._problem import ARRAYS, Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh._window import Axis

driver = pytest.importorskip("cupy").cuda.driver

H200 = _device.Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024)
KERNEL = _jit.Kernel("sums/shares", "")


@pytest.fixture
def launched(monkeypatch):
    """What is launched: (function, grid, threads, shared bytes, stream, address of the frame)."""
    calls: list[Any] = []

    def launch_kernel(function, x, y, z, threads, y_threads, z_threads, shared, stream, frame, _):
        assert (z, y_threads, z_threads) == (1, 1, 1)
        calls.append(SimpleNamespace(
            function=function, grid=(x, y), threads=threads, shared=shared, stream=stream,
            frame=ctypes.string_at(frame, 4096) if frame else b"", address=frame,
        ))  # fmt: skip

    monkeypatch.setattr(driver, "launchKernel", launch_kernel)
    monkeypatch.setattr(_jit, "start", lambda kernels, device: None)
    monkeypatch.setattr(_jit, "load", loaded)
    monkeypatch.setattr(_device, "cuda", lambda index: H200)
    return calls


def loaded(kernel: _jit.Kernel, device: _device.Device) -> Any:
    """A function of the driver that stands for `kernel`."""
    return SimpleNamespace(
        kernel=SimpleNamespace(ptr=hash(kernel) & 0xFFFF), max_dynamic_shared_size_bytes=49152
    )


def parameter(call: Any, place: int, size: int) -> bytes:
    """The parameter of a launch that the driver finds at `place`."""
    start = int.from_bytes(call.frame[8 * place : 8 * place + 8], "little") - call.address
    return call.frame[start : start + size]


def words(data: bytes) -> list[int]:
    return list(memoryview(data).cast("q"))


def test_a_launch_gets_its_parameters_and_addresses(launched):
    program = Program(H200)
    first, second = program.array(Spec((4, 3), "float16")), program.array(Spec((2,), "float32"))
    space = program.allocate((5,), "float64")
    record = np.array([(7, 0.5, True)], np.dtype([("a", "i4"), ("b", "f8"), ("c", "?")]))
    assert record.nbytes % 8, "is to be padded"
    later = Pointer(second.pointer.slot, 24)
    parameters = record, [1, second.pointer, -2, later], [space.pointer, first.pointer]
    program.launch(KERNEL, (6, 5), 128, *parameters, shared_bytes=100)
    assert program.workspace == [Spec((5,), "float64")]
    for addresses in ([1000, 2000, 3000], [2**47, 2**47 + 16, 0]):
        program.run(addresses, stream=99)
        call = launched.pop()
        assert (call.grid, call.threads, call.shared, call.stream) == ((6, 5), 128, 100, 99)
        assert parameter(call, 0, record.nbytes) == record.tobytes()
        expected = [1, addresses[1], -2, addresses[1] + 24]
        assert words(parameter(call, 1, 32)) == expected
        assert words(parameter(call, 2, 16)) == [addresses[2], addresses[0]]


def test_a_launch_puts_the_starts_of_a_run_into_records(launched):
    """And nothing else of a program depends on where parts start."""
    near, far = (
        dataclasses.replace(
            PART_PROBLEMS[0], axes=(Axis(8, 6, 3, 1, 1, False, "cut", 100, start, start - 1),)
        )
        for start in (1, 90)
    )
    assert near.anywhere == far.anywhere
    names = _programs.taken(near)
    layouts = tuple((contiguous(near.spec(name).shape), 0) for name in names)
    program = program_of(near.anywhere, "naive", names, near.results, layouts)
    frames = []
    for problem in (near, far, near):
        program.run([0] * 5 + [*start_words(problem)], stream=0)
        frames.append(parameter(launched.pop(), 0, 88))
    place = PART_AXIS.fields["starts"][1]
    assert frames[0] == frames[2]
    assert frames[0][:place] + frames[0][place + 8 :] == frames[1][:place] + frames[1][place + 8 :]
    assert [int.from_bytes(frame[place : place + 4], "little") for frame in frames] == [1, 90, 1]
    assert [int.from_bytes(f[place + 4 : place + 8], "little") for f in frames] == [0, 89, 0]


def test_more_shared_memory_is_asked_for_where_it_is_needed(monkeypatch, launched):
    function = loaded(KERNEL, H200)
    monkeypatch.setattr(_jit, "load", lambda *_: function)
    program = Program(H200)
    program.launch(KERNEL, (1, 1), 32, [0], shared_bytes=10_000)
    program.load()
    assert function.max_dynamic_shared_size_bytes == 49152
    program.launch(KERNEL, (1, 1), 32, [0], shared_bytes=100_000)
    program.load()
    assert function.max_dynamic_shared_size_bytes == 100_000


def test_arrays_say_where_their_parts_are():
    array = Array(Pointer(3, 8), (2, 5, 2), "float32", (20, 4, 2), 8)
    part = array.component(1)
    assert part == Array(Pointer(3, 16), (2, 5), "float32", (20, 4), 0)
    assert array.byte_strides == (80, 16, 8)
    assert (array.size, array.itemsize) == (20, 4)


@given(shape=st.lists(st.integers(1, 5), max_size=5).map(tuple))
def test_contiguous_strides_are_those_of_numpy(shape):
    assert contiguous(shape) == tuple(stride // 8 for stride in np.empty(shape).strides)


@pytest.mark.parametrize(
    ("strides", "misalignment", "width"),
    [((64, 16, 1), 0, 16), ((64, 16, 1), 8, 8), ((64, 18, 1), 0, 4), ((64, 17, 1), 0, 2)],
)
def test_loads_are_as_wide_as_strides_and_addresses_allow(strides, misalignment, width):
    array = Array(Pointer(0), (2, 4, 16), "float16", strides, misalignment)
    assert load_width((array, None)) == width


def test_views_hold_pointers_until_a_program_runs():
    array = Array(Pointer(2), (1, 4, 3, 2, 8), "float16", (192, 48, 16, 8, 1), 0)
    views = Views(2)
    views.vectors(array, None)
    assert views.words == [Pointer(2), 192, 48, 16, 8, 1, 0, 0, 0, 0, 0, 0]


# Backends


def program_of(
    problem: Problem, backend: str | None, names: Any, results: Any, layouts: Any, *off: Any
) -> Program:
    """The program of calls on device 0."""
    known = _programs.known_backends()
    return _programs.program_for(known, problem, 0, backend, names, results, layouts, *off)


def has_choice(backend: Any, problem: Problem) -> bool:
    """Whether it depends on windows and lengths which kernels a call loads."""
    if backend is hopper:
        return len(ways(problem)) > 1 or len(forms_of(problem, H200, ways(problem)[0][0])) > 1
    return backend is fused


@pytest.mark.parametrize("backend", [naive, gemm, fused, hopper])
@given(data=st.data())
def test_a_contiguous_call_loads_what_kernels_names(backend, data):
    """What `cuneigh compile` compiles ahead, no GPU needed."""
    drawn = supported(("forward", "backward")) if backend is hopper else problems()
    problem = data.draw(drawn.filter(lambda p: backend.unsupported(p, H200) is None))
    names = _programs.taken(problem)
    layouts = tuple((contiguous(problem.spec(name).shape), 0) for name in names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "cuda", lambda index: H200)
        _programs.program_for.cache_clear()
        made = program_of(problem, backend.NAME, names, problem.results, layouts)
    seen = set(made.kernels)
    expected = set(backend.kernels(problem, H200))
    assert seen <= expected
    assert seen == expected or has_choice(backend, problem), "others are for other windows"
    assert all(0 not in spec.shape for spec in made.workspace)


# Parameters are the same for every size and dtype.
OPERATION_PROBLEMS = {
    operation: dataclasses.replace(
        attention_problem(
            "test",
            "forward",
            *(Spec((1, 8, 2, 64), "float16"),) * 3,
            window_arguments("test", 1, 3, 1, 1, False),
            None,
        ),
        operation=operation,
        additional=2 if operation != "forward" else None,
        rpb_dtype="float16" if operation in ("backward", "qk", "qk_backward") else None,
    )
    for operation in ARRAYS
}


PART_PROBLEMS = [
    dataclasses.replace(
        OPERATION_PROBLEMS[operation],
        axes=(Axis(8, 6, 3, 1, 1, False, "cut", 10, 1, 2),),
        has_key_mask=True,
    )
    for operation in ("forward", "backward")
]
"""Parts of a layout, whose kernels are compiled apart from those of whole ones; these with a mask,
those above without one."""


BY_NAME = {"ids": lambda backend: backend.NAME}


@needs_nvrtc
@pytest.mark.parametrize("backend", [naive, gemm, fused, hopper], **BY_NAME)
def test_parameters_are_as_large_as_those_of_the_kernels(backend, monkeypatch):
    """No struct of a kernel has more or fewer members than what is packed for it."""
    packed = packed_by(backend, (*OPERATION_PROBLEMS.values(), *PART_PROBLEMS), monkeypatch)
    assert packed
    for kernel, sizes in packed.items():
        check_sizes(kernel, "sm_90", sizes)


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize("backend", [naive, fused], **BY_NAME)
def test_kernels_of_parts_with_masks_do_not_spill(backend, monkeypatch, tmp_path):
    """Masks are not in the kernels that tests of these backends compile for all architectures."""
    packed = packed_by(backend, PART_PROBLEMS, monkeypatch)
    for (kernel, _), compiled in _jit.precompile(packed, ["sm_90"], tmp_path).items():
        assert parameter_sizes(compiled.cubin.read_bytes()) == packed[kernel], kernel.name
        spilled = compiled.resources.spill_stores + compiled.resources.spill_loads
        assert spilled == 0, f"{kernel.name} spills {spilled} bytes:\n{kernel.plan}"


def packed_by(
    backend: Any, problems: Iterable[Problem], monkeypatch: pytest.MonkeyPatch
) -> dict[_jit.Kernel, list[int]]:
    """The bytes of every parameter of the kernels that a backend launches for these problems."""
    packed: dict[_jit.Kernel, list[int]] = {}

    def record(self, kernel, grid, threads, *parameters, shared_bytes=0):
        packed[kernel] = [
            parameter.nbytes if isinstance(parameter, np.ndarray)
            else parameter.values.nbytes if isinstance(parameter, Record)
            else 128 if isinstance(parameter, TensorMap)
            else 8 * len(parameter)
            for parameter in parameters
        ]  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(Program, "launch", record)
        patch.setattr(_device, "cuda", lambda index: H200)
        _programs.program_for.cache_clear()
        for problem in problems:
            if backend.unsupported(problem, H200) is None:
                names = _programs.taken(problem)
                layouts = tuple((contiguous(problem.spec(name).shape), 0) for name in names)
                program_of(problem, backend.NAME, names, problem.results, layouts)
        _programs.program_for.cache_clear()
    return packed


def forward_of(
    layouts: Any = None,
    results: Any = None,
    backend: str | None = None,
    window: int = 7,
    misalignments: tuple[int, ...] = (),
) -> Program:
    query = Spec((1, 14, 14, 4, 32), "float16")
    axes = window_arguments("test", 2, window, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, axes, None)
    return program_of(
        problem,
        backend,
        ("query", "key", "value"),
        results or (problem.output, problem.lse),
        layouts or ((contiguous(query.shape), 0),) * 3,
        misalignments,
    )


def test_a_program_is_kept_for_calls_that_are_laid_out_alike(launched, monkeypatch):
    _programs.program_for.cache_clear()
    first = forward_of()
    assert forward_of() is first
    plain = contiguous((1, 14, 14, 4, 32)), 0
    wide, off = ((50_000, 2000, 128, 32, 1), 0), (plain[0], 8)
    others = [
        forward_of(layouts=(plain, wide, plain)),
        forward_of(layouts=(plain, plain, wide)),
        forward_of(layouts=(plain, off, plain)),
        forward_of(results=(Spec((1, 14, 14, 4, 32), "float16"), None)),
        forward_of(misalignments=(8, 0)),
        forward_of(backend="naive"),
        forward_of(window=5),
    ]
    monkeypatch.setenv("CUNEIGH_WORKSPACE_BYTES", "100000")
    others.append(forward_of())
    monkeypatch.setattr("cuneigh._backends.BACKENDS", BACKENDS[1:])
    others.append(forward_of())
    assert len({id(program) for program in (first, *others)}) == len(others) + 1


def test_a_result_off_its_alignment_is_stored_in_narrower_pieces(monkeypatch):
    monkeypatch.setattr(_device, "cuda", lambda index: H200)
    _programs.program_for.cache_clear()
    made = [
        forward_of(backend="naive", misalignments=misalignments)
        for misalignments in ((), (8, 0), (2, 4))
    ]
    plans = [kernel.plan for program in made for kernel in program.kernels]
    widths = [re.search(r"kValueVector = (\d+)", plan)[1] for plan in plans]
    assert widths == ["8", "4", "1"]


def test_two_threads_may_run_one_program(launched):
    """The frame of a launch is its own: a thread never sees the addresses of another."""
    program = Program(H200)
    array = program.array(Spec((4,), "float32"))
    program.launch(KERNEL, (1, 1), 32, [array.pointer])
    program.run([1], 0)
    program.run([2], 0)
    assert [words(parameter(call, 0, 8)) for call in launched] == [[1], [2]]


@pytest.mark.parametrize(
    ("backend", "shape", "last"),
    [
        ("hopper", (1, 96, 48, 2, 32), ["hopper/dkv", None, "hopper/dq"]),
        ("hopper", (1, 8192, 2, 128), ["sums/delta", "hopper/backward"]),
        ("fused", (1, 96, 48, 8, 128), ["sums/delta", "fused/backward", None, "fused/backward"]),
        ("fused", (8, 28, 28, 2, 64), ["fused/small/backward", "fused/small/backward"]),
    ],
)
def test_gradients_of_keys_are_told_of_before_that_of_the_query_is_launched(
    backend, shape, last, monkeypatch
):
    """Where kernels compute them in this order."""
    noted: list[Any] = []

    def noting(recorded: Any, device: Any) -> Any:
        return lambda addresses, stream: noted.append(recorded.kernel.name)

    monkeypatch.setattr(Launch, "load", noting)
    monkeypatch.setattr(_Clear, "load", lambda recorded, device: lambda addresses, stream: None)
    monkeypatch.setattr(Program, "compile", lambda program: None)
    query = Spec(shape, "bfloat16")
    axes = window_arguments("test", len(shape) - 3, shape[1] // 4, 1, 1, False)
    problem = attention_problem("test", "backward", query, query, query, axes, None)
    device = dataclasses.replace(H200, memory=141 << 30)
    program, _ = _programs.rehearse(problem, device, backend)
    program.run([], 0)
    plain = noted.copy()
    noted.clear()
    program.run([], 0, lambda: noted.append(None))
    assert [name for name in noted if name] == plain
    assert noted[-len(last) :] == last


# Problems as keys


def test_equal_problems_have_equal_hashes_in_every_process():
    query = Spec((1, 8, 8, 2, 4), "float32")
    axes = window_arguments("test", 2, 3, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, axes, 0.5)
    hash(problem)  # which is kept
    code = (
        "import pickle, sys; problem = pickle.loads(sys.stdin.buffer.read());"
        "from dataclasses import replace; assert hash(problem) == hash(replace(problem))"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(problem), check=True)
