"""How long a decoder waits for attention to its cache of keys: few queries, a long window.

    python bench/decode.py --output bench/results/decode.json

A causal window of 4096 keys, 32 query heads on 8 key heads, head_dim 128, bfloat16. Everything is
replayed from CUDA graphs with the L2 cache flushed. `us` is the time between events around a graph
of one call. `node_us` is what the call adds to a graph of many, each after a kernel that flushes
the cache: between events there is the start of a graph, too, which a decoder's graph has once.
Bandwidth is that of keys and values, each read once, in `us`, as a share of what a copy reaches
here and now. Results are compared with those of `naive`.

Every plan that is worth trying is timed: of `fused` those for few queries, and those of `hopper`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cupy

import cuneigh
from cuneigh._backends import choose, hopper
from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._device import cuda
from cuneigh._gpu import tuned
from cuneigh._gpu.passes import FORWARD
from cuneigh._gpu.records import start_words
from cuneigh._measure.arrays import normal
from cuneigh._measure.clock import FLUSH_BYTES, GpuClock, copy_gbps
from cuneigh._measure.provenance import provenance
from cuneigh._measure.trials import empty
from cuneigh._problem import Problem
from cuneigh._programs import rehearse
from cuneigh._window import Axis

WINDOW, HEADS, KV_HEADS, DIM = 4096, 32, 8, 128
LAYOUT, POSITION = 65536, 40_000
CASES = {
    "batch 32": (32, 1, {"share": 0.70}),
    "batch 1": (1, 1, {"us": 12.0}),
    "batch 1, chunk of 64": (1, 64, {"us": 12.0}),
    "batch 32, chunk of 64": (32, 64, {"share": 0.70}),
}
"""Batch, queries and what is asked for."""
NODES = 20
BUDGET_MS = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--plans", type=int, default=14, help="how many plans to try of each")
    options = parser.parse_args()
    copy = copy_gbps()
    document: dict[str, Any] = {**provenance(cuda(0)), "copy_gbps": round(copy), "cases": {}}
    print(f"copy: {copy:.0f} GB/s")
    for name, (batch, queries, asked) in CASES.items():
        document["cases"][name] = figures = {"asked": asked, **measure(batch, queries, copy)}
        figures["plans"] = plans(batch, queries, copy, options.plans)
        called = f"as called: {figures['backend']}, {figures['plan']}"
        for label, one in ((called, figures), *figures["plans"].items()):
            print(f"{name:22} {one['us']:7.1f} us  {one['node_us']:7.1f} us in a graph of many  "
                  f"{100 * one['share']:3.0f} % of a copy  predicted "
                  f"{one.get('predicted_us', '')}  {label}", flush=True)  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


def arrays(batch: int, queries: int) -> list[Any]:
    """The queries, and the keys and values that they see."""
    keys = WINDOW + queries - 1
    shapes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [normal(cupy, (batch, *shape, DIM), "bfloat16", i) for i, shape in enumerate(shapes)]


def step(given: list[Any], backend: str | None = None) -> Any:
    return cuneigh.na1d(
        *given,
        WINDOW,
        is_causal=True,
        layout=LAYOUT,
        query_start=POSITION,
        key_start=POSITION - WINDOW + 1,
        backend=backend,
    )


def measure(batch: int, queries: int, copy: float) -> dict[str, Any]:
    """The public function, which takes the planner's plan."""
    given = arrays(batch, queries)
    check(step(given), step(given, "naive"))
    problem = problem_of(batch, queries).anywhere
    backend = choose(problem, cuda(0), None)
    _, (planned, *_) = rehearse(problem, cuda(0), backend.NAME)
    named = {"backend": backend.NAME, "plan": str(planned.plan)}
    predicted = {"predicted_us": round(1e3 * backend.predicted_ms(problem, cuda(0)), 1)}
    return {**named, **figures_of(lambda: step(given), given, copy), **predicted}


def problem_of(batch: int, queries: int) -> Problem:
    """That of `step`."""
    start = POSITION - WINDOW + 1
    given = queries, WINDOW + queries - 1
    axis = Axis(*given, WINDOW, 1, 1, True, "shift", LAYOUT, POSITION, start)
    return Problem("forward", "bfloat16", batch, HEADS, KV_HEADS, DIM, DIM, (axis,), DIM**-0.5)


def plans(batch: int, queries: int, copy: float, most: int) -> dict[str, Any]:
    """The times of the plans to try, by backend and plan."""
    given, device, problem = arrays(batch, queries), cuda(0), problem_of(batch, queries)
    wanted = step(given, "naive")
    found = {}
    for backend, plan in to_try(problem, most):
        with tuned.forcing({"forward": plan}):
            program, _ = rehearse(problem, device, backend)
        output, lse = empty(problem.output), empty(problem.lse)
        held = (*given, output, lse, *map(empty, program.workspace))
        addresses = [*(array.data.ptr for array in held), *start_words(problem)]

        def run(program: Any = program, addresses: list[int] = addresses) -> None:
            program.run(addresses, cupy.cuda.get_current_stream().ptr)

        run()
        check(output, wanted)
        figures = found[f"{backend}, {plan}"] = figures_of(run, given, copy)
        predicted = (
            split_plan.predicted_ms(problem, plan, device)
            if backend == "fused"
            else (hopper.model(problem, device, {"forward": plan}, hopper.RATES))
        )
        figures["predicted_us"] = round(1e3 * predicted, 1)
    return found


def to_try(problem: Problem, most: int) -> list[tuple[str, Any]]:
    """Of each backend the plans with the shortest predicted times, first one of each form."""
    device = cuda(0)
    tried = split_plan.plans_to_try(problem, device, FORWARD, 1000)
    found = [("fused", plan) for plan in by_forms(tried)[:most]]
    if problem.tokens[0] > 1 and hopper.unsupported(problem, device) is None:
        tried = hopper.plans(problem, device)["forward"]
        found += [("hopper", plan) for plan in by_forms(tried)[:most]]
    return found


def by_forms(plans: Sequence[Any]) -> list[Any]:
    """The same, but first one of each form."""
    of_forms = {plan.form: plan for plan in reversed(plans)}
    return list(dict.fromkeys((*reversed(of_forms.values()), *plans)))


def check(output: Any, wanted: Any) -> None:
    """Raise unless two outputs agree as far as their rounding allows."""
    first, second = (
        (each.view("uint16").get().astype("uint32") << 16).view("float32")
        for each in (output, wanted)
    )
    error = float(abs(first - second).max())
    assert error <= 0.02 * float(abs(second).max()), f"wrong by {error}"


def figures_of(call: Callable[[], Any], given: list[Any], copy: float) -> dict[str, float]:
    times = GpuClock().measure(call, BUDGET_MS)
    us = 1e3 * float(times.graph_ms or times.ms)
    share = sum(array.nbytes for array in given[1:]) / us / 1e3 / copy
    return {"us": round(us, 2), "node_us": round(node_us(call), 2), "share": round(share, 3)}


def node_us(call: Callable[[], Any]) -> float:
    """Microseconds that a call adds to a graph of many."""
    stream = cupy.cuda.Stream(non_blocking=True)
    flush = cupy.empty(FLUSH_BYTES, "uint8")
    with stream:
        both = replayed(lambda: (flush.fill(0), call()), stream)
        return 1e3 * (both - replayed(lambda: flush.fill(0), stream)) / NODES


def replayed(call: Callable[[], Any], stream: Any) -> float:
    """The median of the milliseconds of a graph of calls."""
    call()
    stream.begin_capture()
    for _ in range(NODES):
        call()
    graph = stream.end_capture()
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(9):
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end))
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
