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
import numpy as np
from harness import ROOT, check, measure, provenance

import cuneigh
from cuneigh import _validate
from cuneigh._problem import Operands, Spec

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
        document = {**provenance(), "problems": results, "summary": summary}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Check and time one problem."""
    tokens, dim, dtype = case["tokens"], case["dim"], case["dtype"]
    rng = cupy.random.default_rng(1)
    shape = (case["batch"], *tokens, case["heads"], dim)
    query, key, value = (
        rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(3)
    )
    function = (cuneigh.na1d, cuneigh.na2d)[len(tokens) - 1]

    def call() -> Any:
        return function(
            query,
            key,
            value,
            kernel_size=tuple(case["kernel"]),
            dilation=tuple(case["dilation"]),
            backend="naive",
        )

    spec = Spec(shape, dtype)
    window = _validate.window_arguments(
        "bench", len(tokens), case["kernel"], 1, case["dilation"], False
    )
    problem = _validate.attention_problem("bench", "forward", spec, spec, spec, window, None)
    check(problem, Operands(query, key, value), call())
    times = measure(call, budget_ms=60.0)
    ours = min(times.values())
    return {
        **case,
        **times,
        "ours_ms": ours,
        "ratio": case["naive_softmax_ms"] / ours,
        "tflops": problem.flops() / ours / 1e9,
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
