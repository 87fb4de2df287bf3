"""The threads of the CPU backend: interrupts, other libraries' limits, the end of a process."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from helpers.interrupts import interrupt_at_entry
from threadpoolctl import threadpool_info, threadpool_limits

import cuneigh
from cuneigh._backends.cpu import blas, helpers

ARRAY = np.random.default_rng(0).standard_normal((2, 10, 10, 2, 4), dtype="float32")
LSE = ARRAY[..., 0].copy()


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUNEIGH_NUM_THREADS", "2")


@pytest.fixture
def limits() -> Iterator[None]:
    """The test leaves the BLAS the threads that it found, whoever is asked for their number."""
    told, real = blas_threads(), real_threads()
    yield
    assert blas_threads() == told
    assert real_threads() == real


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def real_threads() -> list[int]:
    return [library.read() for library in blas._libraries()]


def forward() -> np.ndarray:
    return cuneigh.na2d(ARRAY, ARRAY, ARRAY, 5)


def backward() -> np.ndarray:
    return cuneigh.na2d_backward(ARRAY, ARRAY, ARRAY, ARRAY, ARRAY, LSE, 5).key


# Interrupts


@pytest.mark.parametrize("call", [forward, backward])
def test_an_interrupt_anywhere_disturbs_no_later_call(call, limits):
    expected = call()
    interrupted = 0
    for number in range(1, 1000):
        sys.setprofile(interrupt_at_entry(number))
        try:
            call()
        except KeyboardInterrupt:
            interrupted += 1
        else:
            break
        finally:
            sys.setprofile(None)
        assert not helpers._helpers._unfinished
        np.testing.assert_array_equal(call(), expected)
    assert 10 < interrupted < 990


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_interrupts_at_random_times_disturb_no_later_call(limits):
    expected, rng, interrupted = backward(), random.Random(0), 0
    start = time.perf_counter()
    backward()
    longest = 1.5 * (time.perf_counter() - start)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, longest))
                backward()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 20
    np.testing.assert_array_equal(backward(), expected)


# Limits of other libraries


@contextmanager
def computing() -> Iterator[Callable[[], None]]:
    """A call of another thread is computing, until it ends or what is given is called."""
    inside, end = threading.Event(), threading.Event()

    def work(job: helpers.Job) -> None:
        inside.set()
        end.wait(60)

    def finish() -> None:
        end.set()
        caller.join()

    caller = threading.Thread(target=helpers.Job(work, 1).run)
    caller.start()
    assert inside.wait(60)
    try:
        yield finish
    finally:
        finish()


@pytest.mark.parametrize("theirs", [1, 3])
def test_a_limit_that_begins_during_a_call_and_ends_after_it(theirs, limits):
    with computing() as finish, threadpool_limits(theirs, user_api="blas"):
        assert set(real_threads()) == {1}
        assert set(blas_threads()) == {theirs}
        finish()
        assert set(real_threads()) == {theirs}


@pytest.mark.parametrize("theirs", [1, 3])
def test_a_limit_that_begins_before_a_call_and_ends_during_it(theirs, limits):
    before = blas_threads()
    with ExitStack() as stack:
        with threadpool_limits(theirs, user_api="blas"):
            stack.enter_context(computing())
        assert blas_threads() == before
        assert set(real_threads()) == {1}


def test_the_call_that_begins_first_may_end_first(limits):
    with computing() as first, computing():
        first()
        assert set(real_threads()) == {1}


# Where no thread can be started


def test_without_threads_the_caller_computes(monkeypatch, limits):
    expected = forward(), backward()

    def refuse(*arguments: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers, "start_new_thread", refuse)
    monkeypatch.setattr(helpers, "_helpers", helpers._Helpers())
    for got, right in zip((forward(), backward()), expected, strict=True):
        np.testing.assert_array_equal(got, right)
    assert not helpers._helpers._unfinished


def test_calls_while_python_ends():
    script = """if True:
        import atexit, threading
        import numpy, cuneigh

        array = numpy.ones((1, 64, 2, 8), "float32")

        def call(when, na1d=cuneigh.na1d, array=array):
            print(when, na1d(array, array, array, 5).shape == array.shape, flush=True)

        class Kept:
            def __del__(self, call=call):
                call("taken down")

        def outlive():
            threading.main_thread().join()
            call("main thread over")

        atexit.register(call, "exit")
        kept = Kept()
        threading.Thread(target=outlive).start()
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    # What is taken down last may find modules gone, but the process ends.
    assert done.stdout.splitlines()[:2] == ["main thread over True", "exit True"]
