"""How every GPU benchmark here checks and times an operation.

A call is checked on a sample of queries before it is timed. A time is the median over many warm
calls of the whole operation, between CUDA events; before each, 256 MB are written so that nothing
of the inputs is left in the L2 cache. `ms` is the plain call, `graph_ms` its CUDA graph replay.
"""

from __future__ import annotations

import datetime
import itertools
import os
import statistics
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from cuneigh._problem import Operands, Problem

ROOT = Path(__file__).resolve().parent
FLUSH_BYTES = 256 << 20


def measure(call: Callable[[], object], budget_ms: float = 200.0) -> dict[str, float]:
    """Median times of `call` in ms, plain and as a CUDA graph; `budget_ms` limits the repeats."""
    stream, flush = _stream_and_flush()
    with stream:
        call()
        first = _time(call, stream, flush, 3)
        repeats = max(5, min(100, round(budget_ms / max(first, 1e-3))))
        plain = _time(call, stream, flush, repeats)
        stream.begin_capture()
        call()
        graph = stream.end_capture()
        replay = _time(lambda: graph.launch(stream), stream, flush, repeats)
    return {"ms": round(plain, 5), "graph_ms": round(replay, 5)}


@lru_cache(maxsize=1)
def _stream_and_flush() -> tuple[Any, Any]:
    """The same for every measurement: CuPy's pool gives no stream what another one has freed."""
    return cupy.cuda.Stream(non_blocking=True), cupy.empty(FLUSH_BYTES, dtype=np.uint8)


def _time(call: Callable[[], object], stream: Any, flush: Any, repeats: int) -> float:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(repeats):
        flush.fill(0)
        start.record(stream)
        call()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def check(problem: Problem, operands: Operands, output: Any, samples: int = 32) -> None:
    """Compare `output` with float64 on a few queries, the corners of the layout among them."""
    rng = np.random.default_rng(0)
    corners = list(itertools.product(*({0, length - 1} for length in problem.tokens)))
    tokens = corners + [tuple(rng.integers(problem.tokens)) for _ in range(samples)]
    for token in tokens:
        batch, head = int(rng.integers(problem.batch)), int(rng.integers(problem.heads))
        keys = []
        for axis, x in zip(problem.axes, token, strict=True):
            group = int(x) % axis.dilation
            begin, end = axis.window(int(x) // axis.dilation, group)
            keys.append(np.arange(begin, end) * axis.dilation + group)
        window = np.ix_(*keys)
        kv_head = head // problem.group_size
        query = cupy.asnumpy(operands.query[(batch, *token, head)]).astype(np.float64)
        key = cupy.asnumpy(operands.key[batch][window][..., kv_head, :]).astype(np.float64)
        value = cupy.asnumpy(operands.value[batch][window][..., kv_head, :]).astype(np.float64)
        logits = problem.scale * (key.reshape(-1, problem.head_dim) @ query)
        weights = np.exp(logits - logits.max())
        expected = weights @ value.reshape(-1, problem.value_dim) / weights.sum()
        got = cupy.asnumpy(output[(batch, *token, head)]).astype(np.float64)
        eps = {"float16": 2**-10, "bfloat16": 2**-7}.get(problem.dtype, 2**-20)
        bound = 2 * eps * np.abs(value).max()
        error = np.abs(got - expected).max()
        if not error <= bound:
            raise AssertionError(f"{problem}: error {error:.3g} > {bound:.3g} at {token}")


def ceilings() -> dict[str, float]:
    """Measured copy bandwidth in GB/s, reads and writes both counted: the best of several ways.

    `copyto` is a cudaMemcpyAsync, which a CUDA graph holds as a copy node and not as a kernel. That
    was the only way once, and gave 2.7 TB/s on an H200, where plain copies reach 4.3.
    """
    source = cupy.random.random((1 << 28,), dtype=np.float32)
    target = cupy.empty_like(source)
    ways = (lambda: cupy.copyto(target, source), lambda: cupy.positive(source, out=target))
    ms = min(time for way in ways for time in measure(way).values())
    return {"copy_gbps": 2 * source.nbytes / ms / 1e6}


def provenance() -> dict[str, str]:
    """What a result file says about where it comes from."""
    runtime = cupy.cuda.runtime
    device = runtime.getDeviceProperties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "gpu": device["name"].decode(),
        "driver": driver.stdout.strip() or "unknown",
        "cuda": ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion()),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def commit() -> str:
    """`COMMIT`, or the one that is checked out, marked when the sources differ from it."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
