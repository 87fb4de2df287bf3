"""Time against tokens at one window, and against the window at one number of tokens.

    python bench/scaling.py --output bench/results/scaling.json

A forward, and a forward with its backward, by the backend that a call without a name takes, in
bfloat16 on a GPU and in float32 on a CPU. With one window the time grows with the tokens, and not
with their square; with one layout it grows with the window.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from figures import update as draw_figures

from cuneigh._backends import choose
from cuneigh._device import Device
from cuneigh._measure import arrays, ours
from cuneigh._measure.cases import problem_of
from cuneigh._measure.clock import CpuClock, GpuClock
from cuneigh._measure.provenance import provenance

Entry = dict[str, Any]


def series(on_gpu: bool) -> dict[str, list[Entry]]:
    """The problems of each curve."""
    heads = {"heads": 8 if on_gpu else 2, "dim": 64}
    sides = (64, 128, 256, 512, 1024) if on_gpu else (28, 56, 112, 224)
    lengths = [1 << power for power in (range(12, 21, 2) if on_gpu else range(10, 17, 2))]
    side, length = (256, 1 << 16) if on_gpu else (56, 1 << 13)
    return {
        "tokens, 2-D, window 13x13": [{**heads, "tokens": [n, n], "kernel": 13} for n in sides],
        "tokens, 1-D, window 513": [{**heads, "tokens": [n], "kernel": 513} for n in lengths],
        f"window, 2-D, {side}x{side} tokens": [
            {**heads, "tokens": [side, side], "kernel": k} for k in (3, 5, 7, 9, 13, 17, 25, 33, 49)
        ],
        f"window, 1-D, {length} tokens": [
            {**heads, "tokens": [length], "kernel": 1 << power} for power in range(4, 13)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--budget", type=float, default=60.0, help="ms of repeated calls a time")
    options = parser.parse_args()
    xp, device = arrays.here()
    document: dict[str, Any] = {**provenance(device), "series": {}}
    for name, entries in series(device.kind == "cuda").items():
        points = document["series"][name] = []
        for entry in entries:
            points.append(measured(xp, device, entry, options.budget))
            times = ", ".join(f"{kind} {ms:.4g} ms" for kind, ms in points[-1]["ms"].items())
            print(f"{name}: {entry['tokens']}, k = {entry['kernel']}: {times}", flush=True)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(options.output)


def measured(xp: Any, device: Device, entry: Entry, budget_ms: float) -> dict[str, Any]:
    """One problem, checked and timed."""
    on_gpu = device.kind == "cuda"
    clock = GpuClock() if on_gpu else CpuClock()
    problem = problem_of(entry, "bfloat16" if on_gpu else "float32", "scaling")
    operands, gradient = arrays.operands_of(xp, problem), arrays.grad_output_of(xp, problem)
    ours.check(problem, operands, gradient, None)
    times = {
        "forward": clock.measure(lambda: ours.forward(problem, operands, None), budget_ms),
        "forward and backward": clock.measure(
            lambda: ours.step(problem, operands, gradient, None), budget_ms
        ),
    }
    return {
        "tokens": entry["tokens"],
        "kernel": entry["kernel"],
        "backend": choose(problem, device, None).NAME,
        "ms": {kind: each.best for kind, each in times.items()},
    }


if __name__ == "__main__":
    main()
