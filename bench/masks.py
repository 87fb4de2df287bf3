"""What a key mask costs: calls without one, and with some that hide nothing, much and blocks.

    python bench/masks.py --output bench/results/masks.json [--cases seq32k-w2k ..]

Of every case, in bfloat16, a forward and a forward with its backward, by the backends that the
library chooses. Masks are true everywhere (all), at a random half of the keys (half), and up to two
thirds of the first axis (front), as where the rest is padding. The calls of a case run by turns, so
that they meet the same clocks; printed are medians, and their ratios to that without a mask. With
all true at most `LIMIT` is meant, and with the last third hidden less than 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cupy

import cuneigh
from cuneigh._backends import choose
from cuneigh._device import cuda
from cuneigh._measure.arrays import normal
from cuneigh._measure.cases import problem_of
from cuneigh._measure.clock import GpuClock
from cuneigh._measure.provenance import provenance

CASES = json.loads((Path(__file__).parent / "cases.json").read_text())
LIMIT = 1.03
MASKS = "none", "all", "half", "front"
AT_LEAST_MS = 2.0
"""How long one measurement takes; short calls are repeated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--cases", nargs="+", help="names of the cases to run; default: all")
    parser.add_argument("--turns", type=int, default=15, help="calls of each kind")
    options = parser.parse_args()
    document: dict[str, Any] = {**provenance(cuda(0)), "limit": LIMIT, "cases": {}}
    for case in CASES:
        if options.cases is None or case["name"] in options.cases:
            document["cases"][case["name"]] = figures = measure(case, options.turns)
            for kind, found in figures.items():
                ms, chosen = found["ms"], found["backends"]
                ratios = " ".join(f"{name} {ms[name] / ms['none']:.3f}" for name in MASKS[1:])
                print(
                    f"{case['name']:18} {kind:9} {ms['none']:8.3f} ms  {ratios}  {chosen}",
                    flush=True,
                )
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


def measure(case: dict[str, Any], turns: int) -> dict[str, Any]:
    """Milliseconds without a mask and with either, and the backends without one and with one."""
    shape = (case["batch"], *case["tokens"], case["heads"], case["dim"])
    query, key, value, grad_output = (normal(cupy, shape, "bfloat16", seed) for seed in range(4))
    masks = {
        "none": None,
        "all": cupy.ones(shape[:-2], bool),
        "half": cupy.random.default_rng(0).random(shape[:-2], dtype="float32") < 0.5,
        "front": cupy.zeros(shape[:-2], bool),
    }
    masks["front"][:, : 2 * case["tokens"][0] // 3] = True
    window = case["kernel"], case["stride"], case["dilation"], case["causal"]
    name = f"na{len(case['tokens'])}d"
    attend, differentiate = getattr(cuneigh, name), getattr(cuneigh, f"{name}_backward")

    def forward(mask: Any) -> Any:
        return attend(query, key, value, *window, key_mask=mask, return_lse=True)

    def step(mask: Any) -> None:
        output, lse = forward(mask)
        differentiate(grad_output, query, key, value, output, lse, *window, key_mask=mask)

    return {
        kind: {"ms": by_turns(call, masks, turns), "backends": backends(case, kind)}
        for kind, call in (("forward", forward), ("step", step))
    }


def by_turns(call: Callable[[Any], Any], arguments: dict[str, Any], turns: int) -> dict[str, float]:
    """The median time of a call with each of the arguments, as a CUDA graph: without the host."""
    stream = cupy.cuda.Stream(non_blocking=True)

    def milliseconds(replay: Callable[[], Any], calls: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(calls):
            replay()
        end.record(stream)
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) / calls

    with stream:
        for argument in arguments.values():
            call(argument)  # compiles
        replays = {
            name: GpuClock.capture(partial(call, argument), stream)
            for name, argument in arguments.items()
        }
        longest = max(milliseconds(replay, 1) for replay in replays.values())
        calls = max(1, math.ceil(AT_LEAST_MS / longest))
        times: dict[str, list[float]] = {name: [] for name in arguments}
        for _ in range(turns):
            for name, replay in replays.items():
                times[name].append(milliseconds(replay, calls))
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def backends(case: dict[str, Any], kind: str) -> list[str]:
    """Who computes the last part of a call, without a mask and with one."""
    problem = problem_of(case, "bfloat16")
    problem = problem if kind == "forward" else problem.gradient
    return [
        choose(replace(problem, has_key_mask=has_mask), cuda(0), None).NAME
        for has_mask in (False, True)
    ]


if __name__ == "__main__":
    main()
