"""The backends on the problems of the source paper, against its own kernels, on one H200.

The problems and the times of the paper's kernels are those of `paper-kernels-h200.json`; a 3-D grid
is added, for which the paper has no kernels. Every call is checked before it is timed.

    python bench/paper_grid.py --output bench/results/paper-grid.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from figures import update as draw_figures

ROOT = Path(__file__).resolve().parent

RUNS = {
    "naive": ("naive", ("float16", "float32")),
    "gemm": ("gemm", ("float16", "float32")),
    "gemm_tf32": ("gemm", ("float32",)),
    "fused": ("fused", ("float16", "float32")),
    "hopper": ("hopper", ("float16",)),
}
"""What is timed: the backend and the dtypes."""

PAPER = {"naive": "naive_softmax_ms", "gemm": "gemm_softmax_ms", "gemm_tf32": "gemm_softmax_ms"}
"""The paper's kernel of the same family; its float32 GEMM kernels compute in TF32."""
PAPER["fused"] = PAPER["hopper"] = "fused_ms"

BACKENDS = dict.fromkeys(backend for backend, _ in RUNS.values())

BASELINE = "naive_softmax_ms"
PAPER_GEMM = "the paper's GEMM"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--dim", type=int, help="only the problems with this head_dim")
    parser.add_argument("--dilation", type=int, help="only the problems with this dilation")
    parser.add_argument(
        "--backward-dim", type=int, help="time forward and backward, too, where head_dim is this"
    )
    parser.add_argument("--budget-ms", type=float, default=40.0, help="time to spend on repeats")
    arguments = parser.parse_args()
    cases = json.loads((ROOT / "paper-kernels-h200.json").read_text())["problems"]
    results = []
    for case in cases + volumes():
        if arguments.dim not in (None, case["dim"]):
            continue
        if arguments.dilation not in (None, case["dilation"][0]):
            continue
        backward = case["dim"] == arguments.backward_dim
        result = run(case, arguments.runs, arguments.budget_ms, backward)
        results.append(result)
        times = [
            f"{name} {result[f'{name}_ms']}" for name in arguments.runs if f"{name}_ms" in result
        ]
        paper = [f"{name.removesuffix('_ms')} {ms}" for name, ms in result["paper"].items()]
        print(
            f"{case['tokens']} k={case['kernel'][0]} d={case['dilation'][0]} D={case['dim']} "
            f"{case['dtype']}: {', '.join(times)} ms; the paper's {', '.join(paper)}",
            flush=True,
        )
    summary = summarize(results)
    print(f"the choice among backends costs {100 * (cost_of_choice(results) - 1):.2f} %")
    for rank, dtypes in summary.items():
        for dtype, names in dtypes.items():
            for name, figures in names.items():
                print(rank, dtype, name, json.dumps(figures))
    if arguments.output:
        from cuneigh._device import cuda
        from cuneigh._measure.provenance import provenance

        document = {**provenance(cuda(0)), "problems": results, "summary": summary}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(arguments.output)


def volumes() -> list[dict[str, Any]]:
    """The 3-D grid."""
    return [
        {
            "tokens": [16, 32, 32],
            "kernel": [kernel] * 3,
            "dilation": [1] * 3,
            "dim": dim,
            "batch": 4,
            "heads": 8,
            "dtype": dtype,
        }
        for kernel, dim, dtype in itertools.product(
            (3, 5, 7, 9, 11, 13), (32, 64), ("float16", "float32")
        )
    ]


def run(case: dict[str, Any], runs: list[str], budget_ms: float, backward: bool) -> dict[str, Any]:
    """Check and time one problem; a time is the smaller of the plain call's and its graph's."""
    import cupy

    from cuneigh._backends import choose
    from cuneigh._device import cuda
    from cuneigh._measure import arrays, ours
    from cuneigh._measure.cases import problem_of
    from cuneigh._measure.clock import GpuClock

    entry = {name: case[name] for name in ("tokens", "batch", "heads", "dim", "kernel", "dilation")}
    problem = problem_of(entry, case["dtype"], "bench")
    dtype, operands = problem.dtype, arrays.operands_of(cupy, problem)
    grad_output = arrays.grad_output_of(cupy, problem)
    measure = GpuClock().measure
    result = {name: value for name, value in case.items() if not name.endswith("_ms")}
    result["paper"] = {name: value for name, value in case.items() if name.endswith("_ms")}
    for name in runs:
        backend, dtypes = RUNS[name]
        if dtype not in dtypes or not supported(problem, backend):
            continue
        os.environ["CUNEIGH_ALLOW_TF32"] = str(int(name == "gemm_tf32"))

        def call(backend: str = backend) -> Any:
            return ours.forward(problem, operands, backend)

        if name != "gemm_tf32":
            ours.check(problem, operands, None, backend)
        result[f"{name}_ms"] = measure(call, budget_ms).best

        def both(backend: str = backend) -> Any:
            return ours.step(problem, operands, grad_output, backend)

        if backward and supported(replace(problem, operation="backward"), backend):
            ms = measure(both, budget_ms).best
            result[f"{name}_forward_backward_ms"] = ms
    os.environ.pop("CUNEIGH_ALLOW_TF32", None)
    result["chosen"] = choose(problem, cuda(0), None).NAME
    return result


def supported(problem: Any, backend: str) -> bool:
    from cuneigh import _backends, _device

    (module,) = (module for module in _backends.BACKENDS if backend == module.NAME)
    return module.unsupported(problem, _device.cuda(0)) is None


def cost_of_choice(results: list[dict[str, Any]]) -> float:
    """How much longer the chosen backends take than the fastest ones, as a geometric mean."""
    ratios = []
    for result in results:
        times = [result[f"{backend}_ms"] for backend in BACKENDS if f"{backend}_ms" in result]
        if f"{result['chosen']}_ms" in result:
            ratios.append(result[f"{result['chosen']}_ms"] / min(times))
    return statistics.geometric_mean(ratios or [1.0])


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What each backend reaches for each rank and dtype.

    Percent over the paper's naive kernels (the paper's own statistic), and geometric means of the
    time of the paper's kernel of the same family, and of our naive kernels, over ours.
    """
    summary: dict[str, Any] = defaultdict(lambda: defaultdict(dict))
    kinds = defaultdict(list)
    for result in results:
        for name in RUNS:
            if f"{name}_ms" in result:
                kinds[f"{len(result['tokens'])}d", result["dtype"], name].append(result)
    for (rank, dtype, name), group in kinds.items():
        figures: dict[str, Any] = {"problems": len(group)}
        with_paper = [r for r in group if BASELINE in r["paper"]]
        if with_paper:
            faster = [100 * (r["paper"][BASELINE] / r[f"{name}_ms"] - 1) for r in with_paper]
            ratios = [r["paper"][PAPER[name]] / r[f"{name}_ms"] for r in with_paper]
            figures["mean"] = round(statistics.fmean(faster), 1)
            figures["min"], figures["max"] = round(min(faster), 1), round(max(faster), 1)
            figures["geomean_vs_paper"] = round(statistics.geometric_mean(ratios), 3)
        summary[rank][dtype][name] = {"forward": figures}
        for kind, suffix in (("forward", "ms"), ("forward_backward", "forward_backward_ms")):
            ratios = [
                r[f"naive_{suffix}"] / r[f"{name}_{suffix}"]
                for r in group
                if f"naive_{suffix}" in r and f"{name}_{suffix}" in r
            ]
            if ratios:
                of_kind = summary[rank][dtype][name].setdefault(kind, {"problems": len(ratios)})
                of_kind["geomean_vs_naive"] = round(statistics.geometric_mean(ratios), 3)
    return summary


def draw(figure: Any, problems: list[dict[str, Any]]) -> None:
    """Improvement over the paper's naive kernels by kernel size, one panel a rank and dtype."""
    problems = [p for p in problems if BASELINE in p["paper"]]
    kinds = sorted({(len(p["tokens"]), p["dtype"]) for p in problems})
    panels = figure.subplots(1, len(kinds), sharey=True)
    for panel, (rank, dtype) in zip(panels, kinds, strict=True):
        group = [p for p in problems if (len(p["tokens"]), p["dtype"]) == (rank, dtype)]
        ticks: set[int] = set()
        for name in (*RUNS, PAPER_GEMM):
            points = defaultdict(list)
            for p in group:
                ms = p["paper"]["gemm_softmax_ms"] if name == PAPER_GEMM else p.get(f"{name}_ms")
                if ms is not None:
                    points[p["kernel"][0]].append(p["paper"][BASELINE] / ms)
            if points:
                sizes = sorted(points)
                means = [statistics.geometric_mean(points[size]) for size in sizes]
                style = {"linestyle": "--", "color": "gray"} if name == PAPER_GEMM else {}
                panel.plot(sizes, means, marker="o", label=name, **style)
                ticks |= set(sizes)
        panel.set(xscale="log", yscale="log", title=f"{rank}-D {dtype}", xlabel="kernel_size")
        panel.set_xticks(sorted(ticks), sorted(ticks))
        panel.minorticks_off()
        panel.axhline(1, color="gray", linewidth=0.5)
        panel.legend()
    panels[0].set_ylabel("times as fast as the paper's naive kernel")


if __name__ == "__main__":
    main()
