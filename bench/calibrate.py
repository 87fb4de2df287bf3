"""The planners' rates fitted to this GPU, and what choices by them cost on the case set.

`profile --calibrate` tells how far its choices are from the best measured among the problems that
it has fitted to. Here other problems are measured in the same way: the cases of `cases.json`.

    python bench/calibrate.py --output bench/results/calibrate.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from cuneigh._backends import BACKENDS
from cuneigh._gpu import rates
from cuneigh._measure.arrays import here
from cuneigh._measure.cases import read
from cuneigh._measure.provenance import provenance
from cuneigh.cli.profile import report
from cuneigh.cli.profile.calibrate import (
    calibrate,
    cost_of_choices,
    in_order,
    measured,
    operations_of,
)

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--forward", action="store_true", help="no gradients")
    parser.add_argument("--kept", action="store_true", help="take the rates that are kept already")
    parser.add_argument("--seconds", type=float, default=300.0, help="for the cases together")
    options = parser.parse_args()
    xp, device = here()
    document = provenance(device)
    if not options.kept:
        document["calibration"] = calibrate(xp, device)
        report.print_calibration({"device": device.name, **document["calibration"]})
    problems = [
        case.problem
        for case in read(ROOT / "cases.json", "bfloat16")
        if not options.cases or case.name in options.cases
    ]
    operations = operations_of(problems, xp, device)
    if options.forward:
        operations = operations[::2]
    times, failed = measured(in_order(operations), device, time.monotonic() + options.seconds)
    fitted = {
        backend.NAME: rates.of(backend.NAME, device, backend.RATES)
        for backend in BACKENDS
        if hasattr(backend, "RATES")
    }
    document["cases"] = {
        "measured": len(times),
        "failed": failed,
        "choices": {
            "before": cost_of_choices(times, {}),
            "after": cost_of_choices(times, fitted),
        },
    }
    print(json.dumps(document["cases"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
