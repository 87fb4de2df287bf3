"""Two checkouts on one GPU, in turns: what a change has made slower.

    python bench/alternate.py --old ../older-checkout --output FILE

Runs `bench/h200.py` without the naive kernels and `bench/host.py`, each as it stands in its own
checkout: old, new, old, new. Printed are the best time of either checkout and their ratio, the
geometric mean of the ratios, and every case whose ratio exceeds `WORST`. The exit status is 1 if
there is such a case, or if a mean exceeds `MEAN`.

Kernels are compiled before anything is timed. `--seconds` bounds the whole: a round that would not
end in time is not begun, and what has been measured until then is compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NEW = Path(__file__).resolve().parents[1]
MEAN, WORST = 1.01, 1.03

MODELS = "--rank 1 2 3 --dtype bfloat16 --head-dim 32 64 128"
"""What `h200.py` calls, as options of ``python -m cuneigh compile``."""
HOST = "--rank 2 --dtype float16 --head-dim 32"
"""What `host.py` calls."""

CONTROLS = ("  a function that computes nothing", "  in one thread, nothing", "  a sum in jax.jit")
"""Lines of `host.py` in which nothing of cuneigh runs: they show how much the machine varies."""

SHORTENED = """
import sys
import h200
measure = h200.measure
h200.measure = lambda call, budget_ms=200.0: measure(call, min(budget_ms, {budget_ms}))
sys.argv = ["h200.py", *{arguments}]
h200.main()
"""
"""`h200.py` of any checkout, with less time for the repetitions of a case."""

Times = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--rounds", type=int, default=2, help="times that each checkout runs")
    parser.add_argument("--seconds", type=float, default=360.0, help="for everything together")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="of repeated calls, a case")
    parser.add_argument("--cases", nargs="+", help="names of the cases to run; default: all")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    trees = {"old": options.old.resolve(), "new": NEW}
    for tree in trees.values():
        compile_kernels(tree)

    runs: dict[str, Callable[[Path], Times]] = {
        "kernels": lambda tree: kernels(tree, options.budget_ms, options.cases or []),
        "host": host,
    }
    measured: dict[str, list[dict[str, Times]]] = {what: [] for what in runs}
    longest = dict.fromkeys(runs, 0.0)
    failed = False
    for turn, what in itertools.product(range(options.rounds), runs):
        start = time.monotonic()
        if start + longest[what] > end:
            print(f"no time left for round {turn + 1} of {what}", flush=True)
            continue
        try:
            measured[what].append({name: runs[what](tree) for name, tree in trees.items()})
        except subprocess.CalledProcessError as error:
            print(f"{what} failed: {error}", flush=True)
            failed = True
        longest[what] = max(longest[what], time.monotonic() - start)
        print(f"round {turn + 1} of {what}: {time.monotonic() - start:.0f} s", flush=True)
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1) + "\n")
    slower = [compare(what, rounds) for what, rounds in measured.items() if rounds]
    return int(failed or any(slower))


def in_tree(tree: Path, *command: str) -> str:
    """What Python prints for a command, with the modules and benchmarks of this checkout."""
    paths = os.pathsep.join((str(tree), str(tree / "bench")))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def compile_kernels(tree: Path) -> None:
    """With all processors at once, where a first call compiles one kernel after the other."""
    capability = in_tree(
        tree, "-c", "import cupy; print(cupy.cuda.Device(0).compute_capability)"
    ).strip()
    arch = f"sm_{capability}" + "a" * (int(capability) >= 90)
    for problems in (MODELS, HOST):
        in_tree(tree, "-m", "cuneigh", "compile", "--arch", arch, *problems.split())


def kernels(tree: Path, budget_ms: float, cases: list[str]) -> Times:
    """Milliseconds of every case and kind, the better of the call and its CUDA graph."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "h200.json"
        arguments = ["--longest", "0", "--output", str(output)]
        arguments += ["--cases", *cases] if cases else []
        in_tree(tree, "-c", SHORTENED.format(budget_ms=budget_ms, arguments=arguments))
        document = json.loads(output.read_text())
    return {
        f"{case} {backend} {kind}": min(figure["ms"], figure["graph_ms"])
        for case, results in document["cases"].items()
        for backend, figures in results.items()
        if backend != "chosen"
        for kind, figure in figures.items()
    }


def host(tree: Path) -> Times:
    """Microseconds of every line of `host.py`."""
    lines = in_tree(tree, "bench/host.py").splitlines()
    matches = (re.fullmatch(r"(.{36}) +(\d+\.\d)", line) for line in lines)
    return {match[1].rstrip(): float(match[2]) for match in matches if match}


def compare(what: str, rounds: list[dict[str, Times]]) -> bool:
    """Print the ratios of the best times; whether the new checkout is slower."""
    best = [
        {name: min(times[tree][name] for times in rounds) for name in rounds[0][tree]}
        for tree in ("old", "new")
    ]
    ratios = {name: best[1][name] / time for name, time in best[0].items() if name in best[1]}
    print(f"\n{what:42} {'old':>9} {'new':>9} {'new/old':>8}")
    for name, ratio in ratios.items():
        print(f"{name:42} {best[0][name]:9.4g} {best[1][name]:9.4g} {ratio:8.3f}")
    for name in best[0].keys() ^ best[1].keys():
        print(f"{name:42} is measured by one of them only")
    compared = {name: ratio for name, ratio in ratios.items() if name not in CONTROLS}
    mean = math.exp(sum(map(math.log, compared.values())) / len(compared))
    worse = [name for name, ratio in compared.items() if ratio > WORST]
    print(f"geometric mean of new/old: {mean:.4f}; more than {WORST - 1:.0%} slower: ", end="")
    print(", ".join(worse) or "none", flush=True)
    return mean > MEAN or bool(worse)


if __name__ == "__main__":
    sys.exit(main())
