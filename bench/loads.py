"""How long a first call takes, cold and warm: ``python bench/loads.py``, on a machine with a GPU.

Each figure is of a fresh process, from the first call to its result on the GPU. Cold, nothing is
compiled: cuneigh's cache and those of PyTorch, Triton and CUTLASS are empty folders. Warm, the
folders hold what the cold process put there. A step is a forward with its backward by PyTorch's
autograd. Peers are those that are installed. Then, for kernel after kernel, how long a process with
a warm cache takes to find it on disk and to load it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from figures import update as draw_figures

ENTRY = {"tokens": [32, 32], "heads": 4, "dim": 64, "kernel": 13}
DTYPE = "bfloat16"
CONTENDERS = {
    "cuneigh": ("forward", "step"),
    "FlexAttention": ("forward", "step"),
    "FlashAttention-4, block-sparse": ("forward", "step"),
    "NATTEN": ("forward", "step"),
}
FOLDERS = ("CUNEIGH_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUTE_DSL_CACHE_DIR")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--first", nargs=2, help=argparse.SUPPRESS)  # of a process of its own
    parser.add_argument("--each", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first:
        print(json.dumps(first_call(*options.first)))
        return
    if options.each:
        print(json.dumps(each_kernel()))
        return
    from cuneigh._device import cuda
    from cuneigh._measure.provenance import provenance

    document: dict[str, Any] = {**provenance(cuda(0)), "cpus": os.cpu_count(), "seconds": {}}
    print(f"{'seconds until the first result':42s} {'cold':>8s} {'warm':>8s}")
    for name, kinds in CONTENDERS.items():
        for kind in kinds:
            figures = cold_and_warm(name, kind)
            document["seconds"][f"{name}, {kind}"] = figures
            times = [f"{figures[key]:8.2f}" for key in ("cold", "warm") if key in figures]
            print(
                f"{name + ', ' + kind:42s} {' '.join(times) or figures.get('reason')}", flush=True
            )
    with tempfile.TemporaryDirectory() as folder:
        in_process(folder, "--each")
        document["kernels_ms"] = in_process(folder, "--each")
    print(f"{'milliseconds, warm':42s} {'find':>8s} {'load':>8s}")
    for name, find, load in document["kernels_ms"]:
        print(f"{name:42s} {find:8.2f} {load:8.2f}")
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(options.output)


def cold_and_warm(name: str, kind: str) -> dict[str, Any]:
    """The seconds of two processes, of which the second finds what the first has compiled."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for when in ("cold", "warm"):
            found = in_process(folder, "--first", name, kind)
            if "reason" in found:
                return found
            figures[when] = found["seconds"]
    return figures


def in_process(folder: str, *arguments: str) -> Any:
    """What a fresh process of this file prints, with its caches in a folder."""
    places = {name: str(Path(folder) / name.lower()) for name in FOLDERS}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | places | {"CUNEIGH_QUIET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else {"reason": "failed"}


def first_call(name: str, kind: str) -> dict[str, Any]:
    """The seconds that a first call takes, everything but kernels being there."""
    import cupy
    import torch

    import cuneigh
    from cuneigh._measure import arrays, peers
    from cuneigh._measure.cases import problem_of

    problem = problem_of(ENTRY, DTYPE)
    operands = arrays.operands_of(cupy, problem)
    given = peers.given_to(problem, operands, arrays.grad_output_of(cupy, problem))
    leaves = [each.requires_grad_() for each in (given.query, given.key, given.value)]
    # What PyTorch itself imports and starts at a first product and a first gradient. Its thread of
    # gradients begins with another kernel than a product, before which it would warn.
    ones = torch.ones(64, 64, device="cuda", requires_grad=True)
    torch.autograd.grad(2 * (ones @ ones), ones, torch.ones_like(ones))[0].sum().item()

    def ours() -> Any:
        if kind == "forward":
            with torch.no_grad():
                return cuneigh.na2d(*leaves, ENTRY["kernel"])
        return torch.autograd.grad(
            cuneigh.na2d(*leaves, ENTRY["kernel"]), leaves, given.grad_output
        )

    def theirs() -> Any:
        calls = peers.PEERS[name](given)
        return (calls.forward if kind == "forward" else calls.step)()

    torch.cuda.synchronize()
    start = time.perf_counter()
    try:
        ours() if name == "cuneigh" else theirs()
    except peers.UnfitError as error:
        return {"reason": str(error)}
    torch.cuda.synchronize()
    return {"seconds": round(time.perf_counter() - start, 3)}


def each_kernel() -> list[tuple[str, float, float]]:
    """Of a forward and a backward by two backends: name, ms until found on disk, ms to load it."""
    import cupy

    import cuneigh
    from cuneigh._jit import Kernel, _load

    find: dict[Kernel, float] = {}
    whole: dict[Kernel, float] = {}

    def timed(function: Callable[..., Any], times: dict[Kernel, float]) -> Callable[..., Any]:
        def call(kernel: Kernel, *others: Any) -> Any:
            start = time.perf_counter()
            result = function(kernel, *others)
            times.setdefault(kernel, (time.perf_counter() - start) * 1e3)
            return result

        return call

    _load.stored = timed(_load.stored, find)
    _load._load = timed(_load._load, whole)
    arrays = [cupy.ones((1, 14, 14, 4, 32), "float16") for _ in range(3)]
    for backend in ("naive", "fused"):
        output, lse = cuneigh.na2d(*arrays, 7, return_lse=True, backend=backend)
        cuneigh.na2d_backward(output, *arrays, output, lse, 7, backend=backend)
    return [(kernel.name, round(find[kernel], 3), round(ms, 3)) for kernel, ms in whole.items()]


if __name__ == "__main__":
    main()
