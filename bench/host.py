"""Host cost of a call: ``python bench/host.py``, on a machine with a GPU.

The median time from a call to its return in a loop over a 14x14 problem, with autograd on. The host
waits for the GPU after every 50 calls, out of the measurement, so that the queue never fills.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import cupy
import torch

import cuneigh

SHAPE = (1, 14, 14, 4, 32)
WINDOW = 7


def median_us(call: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Median of 1,000 calls, after as many that warm up."""
    times = []
    for turn in range(2000):
        if turn % 50 == 0:
            synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1000:]) * 1e6


def main() -> None:
    arrays = [cupy.random.standard_normal(SHAPE, "float32").astype("float16") for _ in range(3)]
    leaves = [torch.as_tensor(array, device="cuda").requires_grad_() for array in arrays]
    grad_output = torch.ones_like(leaves[0])

    def forward() -> torch.Tensor:
        return cuneigh.na2d(*leaves, WINDOW)

    def step() -> object:
        return torch.autograd.grad(forward(), leaves, grad_output)

    cases = {
        "cupy, forward": lambda: cuneigh.na2d(*arrays, WINDOW),
        "torch, forward": forward,
        "torch, forward and backward": step,
    }
    for name, call in cases.items():
        print(f"{name:28s} {median_us(call, torch.cuda.synchronize):6.1f} us")


if __name__ == "__main__":
    main()
