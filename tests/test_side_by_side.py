"""Kernels of one call, and of the training step that it begins, are compiled side by side."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.interrupts import interrupt_at_entry

from cuneigh import _call, _device, _jit, _programs
from cuneigh._frameworks.contract import Adapter
from cuneigh._gpu.arrays import contiguous
from cuneigh._gpu.program import Program
from cuneigh._jit import _compiler, _load, _progress, _threads
from cuneigh._parameters import window_arguments
from cuneigh._problem import Spec
from cuneigh._validate import attention_problem

H100 = _device.Device("cuda", 0, "NVIDIA H100", (9, 0), 132, 227 * 1024)
BUILT = _compiler.Built(b"cubin", "symbol", _jit.Resources(1, 0, 0, 0, 0))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, an NVRTC that is always there, and a device of no machine."""
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_compiler, "version", lambda: "13.9")
    monkeypatch.setattr(_compiler, "architectures", lambda: ("sm_90",))
    monkeypatch.setattr(_device, "cuda", lambda index: H100)
    monkeypatch.setattr(_load, "_loaded", {})
    monkeypatch.setattr(_load, "_started", {})
    monkeypatch.setattr(_load, "_ready", {})
    monkeypatch.setattr(_progress, "PATIENCE", 0.01)
    _programs.program_for.cache_clear()
    yield tmp_path
    _programs.program_for.cache_clear()


def kernels(count: int) -> list[_jit.Kernel]:
    return [_jit.Kernel("sums/shares", f"// {number}") for number in range(count)]


def finish() -> list[_jit.Compiled]:
    return [_load._compiled(*key_of) for key_of in [(k, H100) for k, _ in list(_load._started)]]


def test_all_are_compiled_at_a_time(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each waits for the others: one after another they would never end."""
    monkeypatch.setattr(_load.os, "cpu_count", lambda: 3)
    _load._compilers.cache_clear()
    together = threading.Barrier(3, timeout=20)

    def build(*_: Any) -> _compiler.Built:
        together.wait()
        return BUILT

    monkeypatch.setattr(_compiler, "build", build)
    wanted = kernels(3)
    _jit.start(wanted, H100)
    _jit.start(wanted, H100)  # which are being compiled already
    assert len(finish()) == 3
    error = capsys.readouterr().err
    assert error == (
        f"cuneigh: compiling sums/shares (3) for sm_90, once: kernels are kept in {cache}\n"
    )
    _jit.start(wanted, H100)  # which are in the cache by now
    assert not _load._started
    assert capsys.readouterr().err == ""
    _load._compilers.cache_clear()


def test_it_can_be_quiet(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUNEIGH_QUIET", "1")
    monkeypatch.setattr(_compiler, "build", lambda *_: BUILT)
    _jit.start(kernels(2), H100)
    finish()
    assert capsys.readouterr().err == ""


def test_an_error_is_raised_where_the_kernel_is_loaded(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: Any) -> _compiler.Built:
        raise _jit.CompilationError("no")

    monkeypatch.setattr(_compiler, "build", build)
    _jit.start(kernels(1), H100)
    for _ in range(2):  # and again: it is tried anew
        with pytest.raises(_jit.CompilationError, match="no"):
            _load._compiled(kernels(1)[0], H100)


def test_a_terminal_gets_a_bar_after_a_while(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    waiting = threading.Event()

    def build(*_: Any) -> _compiler.Built:
        waiting.wait(20)
        return BUILT

    monkeypatch.setattr(_compiler, "build", build)
    monkeypatch.setattr(_progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    bar = _progress._bar

    def begun() -> Any:
        made = bar()  # which imports rich
        threading.Timer(0.5, waiting.set).start()
        return made

    monkeypatch.setattr(_progress, "_bar", begun)
    _jit.start(kernels(1), H100)
    finish()
    printed = capsys.readouterr().err
    assert printed.count("cuneigh: compiling") > 1
    assert "0/1" in printed


def test_an_interrupt_anywhere_disturbs_no_later_load(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts come where the caller enters a function, at the first, the second and so on."""
    monkeypatch.setenv("CUNEIGH_QUIET", "1")
    monkeypatch.setattr(_compiler, "build", lambda *_: BUILT)
    interrupted = 0
    for number in range(1, 1000):
        wanted = [_jit.Kernel("sums/shares", f"// {number}")]
        sys.setprofile(interrupt_at_entry(number))
        try:
            _jit.start(wanted, H100)
            finish()
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.setprofile(None)
        _jit.start(wanted, H100)
        finish()
        assert all(_load.stored(kernel, H100) for kernel in wanted)
        assert not _load._started
    assert 10 < interrupted < 990


def test_at_the_end_what_has_begun_is_waited_for_and_the_rest_dropped() -> None:
    threads, began, may_end = _threads.Threads(1), threading.Event(), threading.Event()

    def first() -> bool:
        began.set()
        return may_end.wait(20)

    tasks = threads.submit(first), threads.submit(lambda: True)
    assert began.wait(20)
    end = threading.Thread(target=_threads.drop_all)
    end.start()
    end.join(0.05)
    assert end.is_alive()
    may_end.set()
    end.join()
    threads.end()
    assert [task.is_done for task in tasks] == [True, False]


def test_without_nvrtc_nothing_is_started(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiler, "version", lambda: None)
    _jit.start(kernels(1), H100)
    assert not _load._started


def test_a_gradient_is_compiled_beside_the_forward(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly what the call for the gradient loads, arguments of any layout included."""
    query = Spec((1, 14, 14, 4, 32), "float16")
    axes = window_arguments("test", 2, 7, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, axes, None)
    started: list[set[_jit.Kernel]] = []
    monkeypatch.setattr(_jit, "start", lambda kernels, device: started.append(set(kernels)))
    arguments = ("query", "key", "value")
    layout = ((50_000, 2000, 140, 33, 1), 2), *[(contiguous(query.shape), 0)] * 2
    _programs.compile_gradient(problem, 0, None, arguments, layout)

    others = ("output", "lse", "grad_output")
    gradient = problem.gradient
    layouts = (*layout, *((contiguous(gradient.spec(name).shape), 0) for name in others))
    program: Program = _programs.program_for(
        _programs.known_backends(),
        gradient,
        0,
        None,
        (*arguments, *others),
        gradient.results,
        layouts,
    )
    assert started == [set(program.kernels)]
    assert len(program.kernels) >= 2


def test_a_call_tells_that_its_gradient_follows() -> None:
    query = Spec((1, 6, 1, 4), "float32")
    axes = window_arguments("test", 1, 3, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, query, axes, None)
    names = ("query", "key", "value")
    call = _call.Call("na1d", Adapter(), None, names, problem, None, (query, None))
    assert not call.is_differentiated
    assert call.with_lse.is_differentiated
    assert not call.gradient((True, False)).is_differentiated
