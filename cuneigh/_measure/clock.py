"""How long a call takes and how much memory, and what the machine can reach: on a GPU or the CPU.

A time is the median over many warm calls of the whole operation. On a GPU it is taken between CUDA
events, and 256 MB are written before each call so that nothing of the inputs is left in the L2
cache; `ms` is the plain call, `graph_ms` its CUDA graph replay.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

Call = Callable[[], Any]
FLUSH_BYTES = 256 << 20


class Times(NamedTuple):
    """Milliseconds of one call."""

    ms: float
    graph_ms: float | None
    """None where the call was not, or could not be, captured."""
    low: float
    high: float
    """The quartiles of the faster way."""

    @property
    def best(self) -> float:
        """The median of the faster way."""
        return self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)


class Ceilings(NamedTuple):
    """What this machine reaches at the moment, measured."""

    copy_gbps: float
    """Of a copy, reads and writes both counted."""
    product_tflops: float
    """Of a library's large matrix product."""


class Clock(Protocol):
    """Measures calls on one kind of device."""

    def measure(self, call: Call, budget_ms: float = 200.0) -> Times:
        """The times of `call`; `budget_ms` limits the repeats."""

    def peak(self, call: Call) -> int | None:
        """Bytes that `call` has allocated at its peak, results included; None if not known."""

    def ceilings(self, dtype: str) -> Ceilings:
        """What the device reaches with arrays of `dtype`."""


def _times(plain: list[float], graph: list[float] | None) -> Times:
    ms = statistics.median(plain)
    graph_ms = None if graph is None else statistics.median(graph)
    faster = plain if graph is None or graph_ms is None or ms <= graph_ms else graph
    low, _, high = statistics.quantiles(faster, n=4, method="inclusive")
    rounded = [None if one is None else round(one, 5) for one in (ms, graph_ms, low, high)]
    return Times(*rounded)  # type: ignore[arg-type]


# A GPU, through CuPy


class GpuClock:
    """Calls that launch on CuPy's current stream."""

    captures = True
    """Whether calls are timed as CUDA graphs, too."""

    @staticmethod
    def capture(call: Call, stream: Any) -> Call | None:
        """A CUDA graph of `call`; None if there can be none."""
        stream.begin_capture()
        call()
        graph = stream.end_capture()
        return lambda: graph.launch(stream)

    def measure(self, call: Call, budget_ms: float = 200.0) -> Times:
        stream, flush = _stream_and_flush()
        with stream:
            call()
            first = statistics.median(_timed(call, stream, flush, 3))
            repeats = max(5, min(100, round(budget_ms / max(first, 1e-3))))
            plain = _timed(call, stream, flush, repeats)
            replay = self.capture(call, stream) if self.captures else None
            graph = None if replay is None else _timed(replay, stream, flush, repeats)
        return _times(plain, graph)

    def peak(self, call: Call) -> int | None:
        call()
        with _peak_hook() as hook:
            results = call()
            del results
        most: int = hook.most
        return most

    def ceilings(self, dtype: str) -> Ceilings:
        return Ceilings(copy_gbps(), product_tflops(dtype))


def _timed(call: Call, stream: Any, flush: Any, repeats: int) -> list[float]:
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(repeats):
        flush.fill(0)
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return times


@lru_cache(maxsize=1)
def _stream_and_flush() -> tuple[Any, Any]:
    """The same for every measurement: CuPy's pool gives no stream what another one has freed."""
    import cupy

    return cupy.cuda.Stream(non_blocking=True), cupy.empty(FLUSH_BYTES, dtype=np.uint8)


def _peak_hook() -> Any:
    """A CuPy hook whose `most` is the most that is allocated at a time while it is active."""
    import cupy

    class Peak(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "peak"

        def __init__(self) -> None:
            self.now = self.most = 0

        def malloc_postprocess(self, **event: Any) -> None:
            self.now += event["mem_size"]
            self.most = max(self.most, self.now)

        def free_preprocess(self, **event: Any) -> None:
            self.now -= event["mem_size"]

    return Peak()


@lru_cache(maxsize=1)
def copy_gbps() -> float:
    """Measured copy bandwidth in GB/s, reads and writes both counted: the best of several ways.

    `copyto` is a cudaMemcpyAsync, which a CUDA graph holds as a copy node and not as a kernel. That
    was the only way once, and gave 2.7 TB/s on an H200, where plain copies reach 4.3.
    """
    import cupy

    source = cupy.zeros((1 << 28,), dtype=np.float32)
    target = cupy.empty_like(source)
    ways = (lambda: cupy.copyto(target, source), lambda: cupy.positive(source, out=target))
    ms = min(GpuClock().measure(way).best for way in ways)
    return float(2 * source.nbytes / ms / 1e6)


@lru_cache(maxsize=4)
def product_tflops(dtype: str) -> float:
    """What a matrix product of cuBLAS reaches, float16 standing for bfloat16, which is as fast."""
    import cupy

    name = "float16" if dtype == "bfloat16" else dtype
    side = 8192 if name == "float16" else 4096
    left, right = (cupy.random.standard_normal((side, side)).astype(name) for _ in range(2))
    clock = GpuClock()
    clock.captures = False  # CuPy does not multiply while a stream is captured
    ms = clock.measure(lambda: cupy.matmul(left, right), 400.0).best
    return float(2 * side**3 / ms / 1e9)


# The CPU


class CpuClock:
    """Calls that have computed when they return."""

    def measure(self, call: Call, budget_ms: float = 200.0) -> Times:
        call()
        times = [_seconds(call)]
        repeats = max(5, min(50, round(budget_ms / 1e3 / max(times[0], 1e-6))))
        times = [1e3 * _seconds(call) for _ in range(repeats)]
        return _times(times, None)

    def peak(self, call: Call) -> int | None:
        """Of memory that NumPy allocates."""
        call()
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def ceilings(self, dtype: str) -> Ceilings:
        return _cpu_ceilings("float64" if dtype == "float64" else "float32")


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@lru_cache(maxsize=2)
def _cpu_ceilings(dtype: str) -> Ceilings:
    source = np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(4))
    side = 1536
    left, right = np.ones((2, side, side), dtype)
    product = min(_seconds(lambda: left @ right) for _ in range(3))
    return Ceilings(2 * source.nbytes / copy / 1e9, 2 * side**3 / product / 1e12)
