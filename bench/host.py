"""Host cost of a call: ``python bench/host.py``, on a machine with a GPU.

The median time from a call to its return in a loop over a 14x14 problem, with autograd on. The host
waits for the GPU after every 50 calls, out of the measurement, so that the queue never fills. What
the frameworks take for the same arrays without cuneigh is measured beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cupy
import jax
import torch
from figures import update as draw_figures

import cuneigh
from cuneigh._device import cuda
from cuneigh._measure.provenance import provenance

SHAPE = (1, 14, 14, 4, 32)
WINDOW = 7
LAYOUT = 5000
"""Tokens along each axis of what the arrays are a part of: no two calls begin at the same place."""

Case = tuple[str, Callable[[], object], Callable[[object], object]]
"""Its name, the call, and what waits for the GPU, given what the call returned."""


def median_us(call: Callable[[], object], wait: Callable[[object], object]) -> float:
    """Median of 1,000 calls, after as many that warm up."""
    times, result = [], call()
    for turn in range(2000):
        if turn % 50 == 0:
            wait(result)
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1000:]) * 1e6


def cases() -> Iterator[Case]:
    arrays = [cupy.random.standard_normal(SHAPE, "float32").astype("float16") for _ in range(3)]

    def wait(_: object) -> None:
        cupy.cuda.Device().synchronize()

    yield "CuPy, forward", lambda: cuneigh.na2d(*arrays, WINDOW), wait

    def part(start: int) -> object:
        options = {"layout": LAYOUT, "query_start": start, "key_start": start}
        return cuneigh.na2d(*arrays, WINDOW, **options)

    others = itertools.cycle(at_other_addresses())
    for backend in ("fused", "hopper") if cuda(0).capability == (9, 0) else ("fused",):
        na2d = functools.partial(cuneigh.na2d, kernel_size=WINDOW, backend=backend)
        yield f"CuPy, {backend}", functools.partial(na2d, *arrays), wait
        yield f"  {backend} at new addresses", lambda call=na2d: call(*next(others)), wait

    starts = itertools.cycle(range(LAYOUT - SHAPE[1] + 1))
    yield "CuPy, part of a layout", lambda: part(100), wait
    yield "CuPy, part at a new start", lambda: part(next(starts)), wait
    leaves = [torch.as_tensor(array, device="cuda").requires_grad_() for array in arrays]
    grad_output = torch.ones_like(leaves[0])

    def forward() -> torch.Tensor:
        return cuneigh.na2d(*leaves, WINDOW)

    def step(forward: Callable[[], torch.Tensor] = forward) -> object:
        return torch.autograd.grad(forward(), leaves, grad_output)

    def nothing() -> object:
        return step(lambda: Nothing.apply(*leaves))

    yield "PyTorch, forward", forward, wait
    yield "PyTorch, forward and backward", step, wait
    yield "  a function that computes nothing", nothing, wait
    with torch.autograd.set_multithreading_enabled(False):
        yield "  in one thread", step, wait
        yield "  in one thread, nothing", nothing, wait

    device = jax.devices("gpu")[0]
    given = [jax.device_put(array.get(), device) for array in arrays]
    jitted = jax.jit(lambda *arrays: cuneigh.na2d(*arrays, WINDOW))
    add = jax.jit(lambda query, key, value: query + key * value)
    yield "JAX, forward", lambda: cuneigh.na2d(*given, WINDOW), jax.block_until_ready
    yield "JAX, forward, in jax.jit", lambda: jitted(*given), jax.block_until_ready
    yield "  a sum in jax.jit", lambda: add(*given), jax.block_until_ready


def at_other_addresses() -> list[list[cupy.ndarray]]:
    """More arguments of one call than are made in a measurement: no address comes twice."""
    calls, step = 4100, 128  # elements: TMA takes addresses at multiples of 16 bytes
    size = math.prod(SHAPE)
    memory = cupy.random.standard_normal(size + 3 * calls * step, "float32").astype("float16")
    return [
        [memory[at : at + size].reshape(SHAPE) for at in range(call, call + 3 * step, step)]
        for call in range(0, 3 * calls * step, 3 * step)
    ]


class Nothing(torch.autograd.Function):  # type: ignore[misc]
    """Allocates what forward and backward return and need between them, and launches nothing."""

    @staticmethod
    def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
        output, lse = torch.empty_like(tensors[0]), tensors[0].new_empty(SHAPE[:-1])
        ctx.save_for_backward(*tensors, output, lse)
        return output

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    options = parser.parse_args()
    about = provenance(cuda(0))
    print(f"commit {about['commit']}, {about['date']}, {about['gpu']}, driver {about['driver']}")
    print("microseconds from the call to its return, median of 1,000")
    figures = {}
    for name, call, wait in cases():
        figures[name.strip()] = round(median_us(call, wait), 2)
        print(f"{name:36s} {figures[name.strip()]:6.1f}", flush=True)
    if options.output:
        document = {**about, "microseconds": figures}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(options.output)


if __name__ == "__main__":
    main()
