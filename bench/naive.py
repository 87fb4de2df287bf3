"""The naive backend against the paper's own naive kernels, on one H200.

Every problem of `paper-kernels-h200.json` (times of the paper's kernels on the same GPU) is checked
and timed, forward; the summary is the geometric mean of the paper's naive time, softmax included,
over ours for each rank and dtype, and the naive kernel's share of its own bound.

    python bench/naive.py --output bench/results/naive.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import cupy

from cuneigh._device import cuda
from cuneigh._measure import arrays, ours
from cuneigh._measure.cases import problem_of
from cuneigh._measure.clock import GpuClock
from cuneigh._measure.provenance import provenance

ROOT = Path(__file__).resolve().parent

FP32_TFLOPS = 67.0
"""Peak of the FMA units of an H200, by its datasheet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each kind")
    arguments = parser.parse_args()

    problems = json.loads((ROOT / "paper-kernels-h200.json").read_text())["problems"]
    seen: dict[Any, int] = defaultdict(int)
    results = []
    for case in problems:
        kind = f"{len(case['tokens'])}d {case['dtype']}"
        seen[kind] += 1
        if arguments.limit and seen[kind] > arguments.limit:
            continue
        result = run(case)
        results.append(result)
        print(
            f"{kind} {case['tokens']} k={case['kernel']} d={case['dilation']} "
            f"D={case['dim']}: {result['ours_ms']:.4f} ms, paper's naive "
            f"{case['naive_softmax_ms']:.4f} ms, {result['ratio']:.2f} times as fast, "
            f"{result['tflops']:.1f} TFLOP/s",
            flush=True,
        )
    summary = summarize(results)
    for kind, figures in summary.items():
        print(kind, figures)
    if arguments.output:
        document = {**provenance(cuda(0)), "problems": results, "summary": summary}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Check and time one problem."""
    entry = {name: case[name] for name in ("tokens", "batch", "heads", "dim", "kernel", "dilation")}
    problem = problem_of(entry, case["dtype"], "bench")
    operands = arrays.operands_of(cupy, problem)
    ours.check(problem, operands, None, "naive")
    times = GpuClock().measure(lambda: ours.forward(problem, operands, "naive"), budget_ms=60.0)
    return {
        **case,
        "ms": times.ms,
        "graph_ms": times.graph_ms,
        "ours_ms": times.best,
        "ratio": case["naive_softmax_ms"] / times.best,
        "tflops": problem.flops() / times.best / 1e9,
        "bound_ms": problem.flops() / FP32_TFLOPS / 1e9,
    }


def summarize(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        kinds[f"{len(result['tokens'])}d {result['dtype']}"].append(result)
    return {
        kind: {
            "problems": len(group),
            "geomean_vs_paper_naive": round(geomean(r["ratio"] for r in group), 2),
            "worst": round(min(r["ratio"] for r in group), 2),
            "geomean_share_of_fma_bound": round(
                geomean(r["bound_ms"] / r["ours_ms"] for r in group), 3
            ),
            "median_tflops": round(statistics.median(r["tflops"] for r in group), 1),
        }
        for kind, group in sorted(kinds.items())
    }


def geomean(values: Any) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


if __name__ == "__main__":
    main()
