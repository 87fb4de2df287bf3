"""Whatever README.md and docs/benchmarks.md say in numbers, made anew: ``python bench/readme.py``.

Figures are drawn of the result files, tables made of them, and the support matrix of what the
backends themselves answer. In README.md that is what stands between ``<!-- begin NAME -->`` and
``<!-- end NAME -->``; docs/benchmarks.md is made as a whole. A test compares both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import figures
from figures import FIGURES, PEERS, RESULTS, ROOT, Comparison, comparisons, geomean
from support import matrix

from cuneigh._backends import BACKENDS
from cuneigh._measure.cases import problem_of
from cuneigh._programs import rehearse
from cuneigh.cli.devices import device_of
from cuneigh.cli.show.picture import figure_of
from cuneigh.cli.show.scene import Scene, scene_of

README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
PLAN = FIGURES / "plan.png"


def main() -> None:
    figures.main()
    scene = plan_scene()
    figure_of(scene).savefig(PLAN, dpi=90, metadata={"Source": plan_source(scene)})
    README.write_text(with_parts(README.read_text(encoding="utf-8")), encoding="utf-8")
    BENCHMARKS.write_text(benchmarks(), encoding="utf-8")
    for path in (PLAN, README, BENCHMARKS):
        print(f"wrote {path.relative_to(ROOT)}")


def with_parts(text: str) -> str:
    """`text` with the parts that are made of results and of backends in their places."""
    for name, make in PARTS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.S)
        assert count == 1, f"README.md has no place for {name}"
    return text


def result(name: str) -> Any:
    """A result file; None where there is none yet."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# README.md


def speed() -> str:
    """How fast the case set is beside its peers, and where it is slower."""
    results = result("h200.json")
    found = comparisons(results, json.loads(PEERS.read_text(encoding="utf-8")))
    means, slower = [], {}
    for kind, title in figures.KINDS.items():
        of_kind = [each for each in found if each.kind == kind and each.ratio is not None]
        means.append(f"{geomean([e.ratio for e in of_kind]):.2f} {title}")
        slower[title] = {each.case: each.ratio for each in of_kind if each.ratio < 1}
    cases = len({each.case for each in found if each.ratio is not None})
    gpu = results["gpu"].removeprefix("NVIDIA ")
    behind = f"**It is slower** {named(slower)}." if named(slower) else "It is nowhere slower."
    if ahead := named(slower_on_one_gpu()):
        behind += f" GPUs differ: by turns on one, FlashAttention-4 is ahead {ahead}."
    return (
        f"How many times as fast as the fastest of NATTEN 0.21, FlexAttention, FlashAttention-4 "
        f"and cuDNN, in bfloat16 on one\n{gpu}: {' and '.join(means)}, as geometric means of "
        f"{cases} problems.\n{behind}\n"
    )


def named(ratios: dict[str, dict[str, float]]) -> str:
    """The cases of each kind, and how many times as fast."""
    return ", and ".join(
        f"{title} on {', '.join(f'{case} ({ratio:.2f})' for case, ratio in by_case.items())}"
        for title, by_case in ratios.items()
        if by_case
    )


def slower_on_one_gpu() -> dict[str, dict[str, float]]:
    """The cases of each kind where FlashAttention-4 was ahead on the same GPU."""
    behind: dict[str, dict[str, float]] = {title: {} for title in figures.KINDS.values()}
    for case, by_kind in result("beside.json")["cases"].items():
        for kind, title in figures.KINDS.items():
            ratio = min(each["ratio"] for each in by_kind[kind].values())
            if round(ratio, 2) < 1:
                behind[title][case] = ratio
    return behind


def plan_scene() -> Scene:
    """The plan that is shown as an example."""
    problem = problem_of(
        {"tokens": [64, 64], "heads": 8, "dim": 64, "kernel": 33, "batch": 4}, "float16"
    )
    fused = next(each for each in BACKENDS if hasattr(each, "plans"))
    _, plans = rehearse(problem, device_of("sm_90"), fused.NAME)
    return scene_of(problem.axes, (28, 33), plans[0])


def plan_source(scene: Scene) -> str:
    """What a picture of a plan was drawn of."""
    assert scene.blocks is not None, "it is that of a plan"
    return f"{scene.blocks.backend}: {scene.blocks.text}"


PARTS: dict[str, Callable[[], str]] = {"speed": speed, "matrix": matrix}


# docs/benchmarks.md


def benchmarks() -> str:
    """The page."""
    parts = ["# Benchmarks", INTRODUCTION]
    parts += [section() for section in SECTIONS]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


INTRODUCTION = """\
Made by `python bench/readme.py` of the files in `bench/results`. Every time is a median of warm
calls whose result was checked first. `bench/NOTES.md` says what bounds the times and what was
tried. `python -m cuneigh profile` measures your own problems the same way."""


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(number: float) -> str:
    """Three significant digits or all before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def source(results: Any, file: str, command: str) -> str:
    machine = results.get("gpu") or results.get("cpu")
    return f"{machine}, commit {results['commit']}; `bench/results/{file}`, made by `{command}`."


def exceptions(results: Any) -> str:
    """The figures of a case set that say themselves which commit they are of."""
    found = [
        f"{case} {figures.KINDS[kind]} {figure['commit']}"
        for case, backends in results["cases"].items()
        for kinds in backends.values()
        for kind, figure in kinds.items()
        if isinstance(figure, dict) and "commit" in figure
    ]
    return f"\nOf other commits: {', '.join(found)}." if found else ""


def of_cases() -> str:
    results = result("h200.json")
    found = comparisons(results, json.loads(PEERS.read_text(encoding="utf-8")))
    by_case: dict[str, dict[str, Comparison]] = {}
    for each in found:
        by_case.setdefault(each.case, {})[each.kind] = each

    def cells(each: Comparison | None) -> list[str]:
        if each is None:
            return [""] * 3
        peer = "" if each.peer_ms is None else f"{digits(each.peer_ms)} ({each.peer})"
        return [digits(each.ms), each.backend, peer]

    rows = [
        [case, *cells(kinds.get("forward")), *cells(kinds.get("forward_backward"))]
        for case, kinds in by_case.items()
    ]
    columns = ["case", "forward", "backend", "best peer", "with backward", "backend", "best peer"]
    return (
        "## The case set\n\nA call without a backend's name in bfloat16, in ms, beside the fastest "
        "of NATTEN 0.21, FlexAttention, FlashAttention-4\nand cuDNN, each at its best "
        "(`bench/peers-h200.json` has all their times; FlashAttention-4's kernel alone, on tokens\n"
        "already in the order that it wants), and, where every query sees every key, cuDNN in the "
        "same run. The problems\nare in `bench/cases.json`.\n"
        + source(results, "h200.json", "bench/h200.py")
        + exceptions(results)
        + "\n\n![](figures/speedup.png)\n\n"
        + table(columns, rows)
    )


def beside_flash() -> str:
    results = result("beside.json")
    rows = []
    for case, figures_of_case in results["cases"].items():
        for kind, title in (("forward", "forward"), ("forward_backward", "with backward")):
            times = dict(figures_of_case[kind])
            mine = times.pop("cuneigh")["ms"]
            rows += [
                [case, title, digits(mine), peer.removeprefix("FlashAttention-4, "),
                 digits(each["ms"]), f"{each['ratio']:.2f}"]
                for peer, each in times.items()
                if kind == "forward_backward" or "deterministic" not in peer
            ]  # fmt: skip
    columns = ["case", "", "cuneigh", "FlashAttention-4", "its time", "times as fast"]
    return (
        "### Beside FlashAttention-4 on one GPU\n\nGPUs of one kind differ by several per cent at "
        "their power limit. Here both ran by turns on one, in ms. The gradients of cuneigh\nare "
        "always the same bits; those of FlashAttention-4 are if it is asked to be deterministic. "
        "Block-sparse: on tokens already in\nthe order of its tiles, or with the permutations of "
        "all arrays.\n"
        + source(results, "beside.json", "bench/beside.py")
        + "\n\n"
        + table(columns, rows)
    )


def on_a_cpu() -> str:
    results = result("cpu.json")
    parts = []
    for entry in results["comparison"]:
        rows = []
        for kind in ("forward", "forward_and_backward"):
            rows += [
                [kind.replace("_", " "), name, digits(ms)]
                for name, ms in entry[f"{kind}_ms"].items()
            ]
        parts.append(f"{entry['case']}, ms:\n\n" + table(["", "", "ms"], rows))
    growth = [
        f"- {entry['cases']}: {name} {', '.join(map(digits, times))} ms"
        for entry in results["growth"]
        for name, times in entry["ms"].items()
    ]
    memory = ", ".join(
        f"{name} {figure['allocated']} MiB" for name, figure in results["memory"].items()
    )
    return "\n\n".join(
        [
            "## On a CPU\n\n"
            f"{results['threads']} threads, float32, batch 1. FlexAttention is compiled, with the "
            "same mask in blocks of several sizes, of which\n128 is its default, and has no "
            "backward there; SDPA has a dense mask.\n"
            f"cuneigh computes {results['compiled']} (the extra `numba`).\n"
            + source(results, "cpu.json", "bench/cpu.py"),
            *parts,
            "Growth with the tokens:\n\n" + "\n".join(growth),
            f"Memory beyond the results, 1-D 65536 tokens, k = 129: {memory}.",
            of_photographs(results),
        ]
    )


def of_photographs(results: Any) -> str:
    rows = []
    for entry in results["photographs"]:
        side, seconds = entry["side"], entry["s"]
        of_pixel = f"{1e6 * sum(seconds.values()) / side**2:.2f}"
        workspace = str(entry["MiB beyond the result"])
        rows.append([f"{side} x {side}", *map(digits, seconds.values()), of_pixel, workspace])
    about = results["measured apart"]["photographs"]
    columns = ["pixels", "query and key, s", "na2d, s", "both, us a pixel", "workspace, MiB"]
    return (
        f"The demo's denoising, 13 x 13 windows and 5 x 5 patches (commit {about['commit']}):\n\n"
        + table(columns, rows)
    )


def of_the_paper() -> str:
    results = result("paper-grid.json")
    rows = []
    for name, dtype in (
        ("gemm", "float32"), ("gemm_tf32", "float32"), ("gemm", "float16"),
        ("fused", "float32"), ("fused", "float16"), ("naive", "float32"), ("naive", "float16"),
    ):  # fmt: skip
        of_ranks = [results["summary"][rank][dtype][name]["forward"] for rank in ("1d", "2d")]
        rows.append(
            [f"`{name.removesuffix('_tf32')}`, {dtype}{' as TF32' if 'tf32' in name else ''}"]
            + [f"{each['mean']:+.0f} %" for each in of_ranks]
            + [f"{each['geomean_vs_paper']:.2f}" for each in of_ranks]
        )
    columns = ["", "1-D", "2-D", "1-D, times as fast", "2-D, times as fast"]
    return (
        "## Beside the paper's own kernels\n\nWhole attention, forward, on the problems on which "
        "the paper's kernels were timed on one H200: mean improvement over its\nnaive kernels, and "
        "how many times as fast as its kernels of the same family, as a geometric mean.\n"
        + source(results, "paper-grid.json", "bench/paper_grid.py")
        + "\n\n![](figures/paper-grid.png)\n\n"
        + table(columns, rows)
    )


def of_naive_kernels() -> str:
    results = result("naive.json")
    rows = [
        [
            kind, str(each["problems"]), f"{each['geomean_vs_paper_naive']:.2f}",
            f"{each['worst']:.2f}", f"{each['geomean_share_of_fma_bound']:.0%}",
        ]
        for kind, each in results["summary"].items()
    ]  # fmt: skip
    columns = ["", "problems", "geometric mean", "worst", "share of the FMA bound"]
    return (
        "### Naive kernels\n\nHow many times as fast `naive` is as the paper's own naive kernels, "
        "whole forward.\n"
        + source(results, "naive.json", "bench/naive.py")
        + "\n\n"
        + table(columns, rows)
    )


def of_memory() -> str:
    results = result("memory.json")
    points = [each for each in results["cases"] if each["case"] == "2-D, window 24x24"]
    columns = ["tokens", *("x".join(map(str, each["tokens"])) for each in points)]
    rows = [
        [kind, *(digits(each[kind] / 2**20) for each in points)] for kind in ("forward", "backward")
    ]
    return (
        f"## Memory\n\nPeak of a call of `fused`, results included, in MiB: {results['heads']} "
        f"heads, D = {results['dim']}, bfloat16, window 24x24. A forward takes\nits output and lse "
        "and nothing else, a backward the gradients and 8 bytes for each query and head; where "
        "`hopper`\ncomputes all gradients at once it also has 260 bytes for each, 516 at head dims "
        "over 64.\n"
        + source(results, "memory.json", "bench/memory.py")
        + "\n\n![](figures/memory.png)\n\n"
        + table(columns, rows)
    )


def of_the_host() -> str:
    results = result("host.json")
    rows = [[name, digits(us)] for name, us in results["microseconds"].items()]
    return (
        "## Host cost\n\nHow long a call of a 14x14 problem keeps the host until it returns, in "
        "us, autograd on, beside what the frameworks take alone.\n"
        + source(results, "host.json", "bench/host.py")
        + "\n\n"
        + table(["", "us"], rows)
    )


def of_first_calls() -> str:
    results = result("loads.json")
    text = (
        "## First calls\n\nSeconds from the first call of a process to its result: cold, with "
        "nothing compiled, and warm, with what an earlier process compiled\non disk.\n"
        + source(results, "loads.json", "bench/loads.py")
    )
    rows = [
        [name, *(f"{times[when]:.2f}" if when in times else "" for when in ("cold", "warm"))]
        for name, times in results["seconds"].items()
        if "reason" not in times
    ]
    if rows:
        text += "\n\n![](figures/loads.png)\n\n" + table(["", "cold", "warm"], rows)
    if "kernels_ms" not in results:  # of a run that was cut short
        return text
    first = results["kernels_ms"][0]
    others = [find + load for _, find, load in results["kernels_ms"][1:]]
    return (
        text
        + f"\n\nA process with a warm cache loads its first kernel in {first[1] + first[2]:.1f}"
        f" ms, and each further one in at most {max(others):.1f}."
    )


def of_scaling() -> str:
    results = result("scaling.json")
    if results is None:
        return ""
    parts = []
    for name, points in results["series"].items():
        rows = [
            [
                "x".join(map(str, each["tokens"])), str(each["kernel"]), each["backend"],
                *(digits(ms) for ms in each["ms"].values()),
            ]
            for each in points
        ]  # fmt: skip
        columns = ["tokens", "kernel_size", "backend", *points[0]["ms"]]
        parts.append(f"Time against {name}, in ms:\n\n" + table(columns, rows))
    heading = "## Time against tokens and window\n\n" + source(
        results, "scaling.json", "bench/scaling.py"
    )
    return "\n\n".join([heading, "![](figures/scaling.png)", *parts])


SECTIONS: tuple[Callable[[], str], ...] = (
    of_cases, beside_flash, of_scaling, of_first_calls, of_memory, of_the_host, on_a_cpu,
    of_the_paper, of_naive_kernels,
)  # fmt: skip


if __name__ == "__main__":
    main()
