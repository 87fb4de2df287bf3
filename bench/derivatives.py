"""What tangents and second derivatives take in PyTorch, as multiples of a forward and of a step.

    python bench/derivatives.py --output bench/results/derivatives.json

A jvp is compared with a forward, and a gradient penalty (the gradient of the squared gradients)
with a step, which is a forward and its backward; all in bfloat16. "along" is the gradient of the
gradients along given directions: a penalty without PyTorch's arithmetic for the squares, which
"squares" has alone, with its gradient. Memory is the peak of PyTorch's allocations beyond what was
there before, in units of the output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cuneigh
from cuneigh._device import cuda
from cuneigh._measure.provenance import provenance

CASES = json.loads((Path(__file__).parent / "cases.json").read_text())
MEASURED = {"nat-stage1": 3.2, "seq4k-w65": 3.2, "flux4k-na": 3.6}
"""The cases, and how many forwards a jvp is meant to take at most."""
SECOND = {"nat-stage1": 4.0, "seq4k-w65": 4.0}
"""How many steps a gradient penalty is meant to take at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    document: dict[str, Any] = {**provenance(cuda(0)), "cases": {}}
    for case in CASES:
        if case["name"] in MEASURED:
            document["cases"][case["name"]] = figures = measure(case)
            for name, figure in figures.items():
                print(f"{case['name']:12} {name:16} {figure}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(case: dict[str, Any]) -> dict[str, Any]:
    shape = (case["batch"], *case["tokens"], case["heads"], case["dim"])
    generator = torch.Generator("cuda").manual_seed(0)
    given, ways = (
        [
            torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            for _ in range(3)
        ]
        for _ in range(2)
    )
    window = case["kernel"], case["stride"], case["dilation"], case["causal"]
    function = getattr(cuneigh, f"na{len(case['tokens'])}d")

    def attend(*arrays: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        return function(*arrays, *window, backend=backend)  # type: ignore[no-any-return]

    def jvp(backend: str | None) -> Any:
        with torch.no_grad():
            return torch.func.jvp(
                lambda *arrays: attend(*arrays, backend=backend), tuple(given), tuple(ways)
            )

    leaves = [array.clone().requires_grad_() for array in given]

    def step(backend: str | None = None, create_graph: bool = False) -> Any:
        loss = (attend(*leaves, backend=backend) * ways[0]).sum()
        return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    def penalty(backend: str | None) -> Any:
        gradients = step(backend, create_graph=True)
        total = sum(gradient.float().square().sum() for gradient in gradients)
        return torch.autograd.grad(total, leaves)

    directions = [array.clone().requires_grad_() for array in ways]

    def squares() -> Any:
        total = sum(direction.float().square().sum() for direction in directions)
        return torch.autograd.grad(total, directions)

    def along(backend: str | None) -> Any:
        return torch.autograd.grad(step(backend, create_graph=True), leaves, ways)

    unit = given[0].nbytes
    forward = figure(lambda: attend(*given), unit)
    found = {"forward": forward, "limit": MEASURED[case["name"]]}
    for backend in (None, "fused", "naive"):
        try:
            made = figure(lambda backend=backend: jvp(backend), unit)
        except RuntimeError as error:
            found[f"jvp {backend}"] = str(error)
            continue
        found[f"jvp {backend}"] = {**made, "forwards": round(made["ms"] / forward["ms"], 2)}
    if case["name"] in SECOND:
        found["step"] = first = figure(step, unit)
        found["squares"] = figure(squares, unit)
        for backend in (None, "fused", "naive"):
            for name, compute in (("second order", penalty), ("second order along", along)):
                second = figure(lambda compute=compute, backend=backend: compute(backend), unit)
                steps = round(second["ms"] / first["ms"], 2)
                limit = SECOND[case["name"]]
                found[f"{name} {backend}"] = {**second, "steps": steps, "limit": limit}
    return found


def figure(call: Callable[[], Any], unit: int) -> dict[str, float]:
    """The median time of warm calls, and their peak of memory."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": round(sorted(times)[7], 4), "outputs_of_memory": round(peak / unit, 2)}


if __name__ == "__main__":
    main()
