"""`python -m cuneigh profile`: what a problem takes here, checked first, beside other libraries.

The options are those of NATTEN's profiler where they mean the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cuneigh import _backends
from cuneigh._problem import DTYPES
from cuneigh.cli.devices import device_of
from cuneigh.cli.positive import positive

SHORT = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
"""NATTEN's names of dtypes."""
PROBLEM = (
    *("batch_size", "heads", "heads_kv", "dim", "dim_value"),
    *("window_size", "stride", "dilation", "causal", "add_kv"),
)
"""The options that describe one problem, as `--input-size` does."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="time a problem on this machine, beside other libraries if asked",
        description="Check and time neighborhood attention for your own shapes: median and "
        "quartiles of many warm calls, operations and bytes a second with their share of what this "
        "machine reaches, memory, and the plan. Without a GPU it is the CPU that is timed.",
        epilog="example: python -m cuneigh profile -i 256 256 -n 24 -d 128 -w 80 80 -s 16 16",
    )
    add_problem_options(parser)
    parser.add_argument(
        "--cases", type=Path, metavar="FILE", help="a JSON file with a list of problems instead"
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these of the file")
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *SHORT),
        help="default: bfloat16 on a GPU, float32 on the CPU",
    )
    parser.add_argument(
        "--backward", "--backprop", action="store_true", help="time forward and backward, too"
    )
    names = [backend.NAME for backend in _backends.BACKENDS]
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=names,
        help="default: all that can run the problem and are not far slower than the fastest",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="time what is installed of SDPA, FlexAttention, FlashAttention-4 and NATTEN, too",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure other plans, too, and keep the fastest for later calls on this GPU "
        "(CUNEIGH_TUNED=0 ignores them)",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="instead of a problem: fit the planners' cost models, which are those of an H200, to "
        "this GPU in under five minutes, and keep them for later calls (CUNEIGH_TUNED=0 ignores "
        "them)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run nothing: list the backends with their plan and predicted time, or why not",
    )
    parser.add_argument(
        "--arch", metavar="SM", help="with --dry-run: of such a GPU, as sm_90, instead of this one"
    )
    parser.add_argument(
        "--budget",
        type=positive(float),
        default=200.0,
        metavar="MS",
        help="milliseconds of repeated calls for each time (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    """What describes one problem, with NATTEN's names."""
    whole = positive(int)
    add = parser.add_argument
    add("-i", "--input-size", nargs="+", type=whole, metavar="N", help="tokens along 1 to 3 axes")
    add("-b", "--batch-size", type=whole, metavar="N", help="default: 1")
    add("-n", "--heads", type=whole, metavar="N", help="default: 1")
    add("--heads-kv", type=whole, metavar="N", help="heads of key and value; default: as many")
    add("-d", "--dim", type=whole, metavar="N", help="of a head; default: 64")
    add("--dim-value", type=whole, metavar="N", help="of a head of value; default: the same")
    add("-w", "--window-size", nargs="+", type=int, metavar="N", help="default: all tokens")
    add("-s", "--stride", nargs="+", type=int, metavar="N", help="default: 1")
    add("--dilation", nargs="+", type=int, metavar="N", help="default: 1")
    add("-c", "--causal", nargs="+", type=_boolean, metavar="BOOL", help="default: false")
    add("--add-kv", type=whole, metavar="N", help="additional keys that every query sees")


def _boolean(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    return values[text.lower()]


_boolean.__name__ = "bool"  # argparse says "invalid bool value"


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        message = str(error).removeprefix("profile: ")
    print(f"python -m cuneigh profile: {message}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace) -> int:
    if options.calibrate:
        return _calibrate(options)
    # Here, and not above, for every command imports this module.
    from cuneigh._measure.arrays import here
    from cuneigh.cli.profile import document, report
    from cuneigh.cli.profile.tune import tune

    if options.arch and not options.dry_run:
        raise ValueError("--arch is for --dry-run: other GPUs than this one cannot be timed")
    if options.peers and options.dry_run:
        raise ValueError("--peers are timed, which --dry-run does not do")
    if options.tune and (options.dry_run or options.backend):
        other = "--dry-run" if options.dry_run else "--backend"
        raise ValueError(f"--tune measures all backends, which {other} does not allow")
    xp, device = here()
    if options.tune and device.kind != "cuda":
        raise RuntimeError("--tune is for GPUs, of which there is none here")
    device = device_of(options.arch) if options.arch else device
    dtype = SHORT.get(options.dtype, options.dtype)
    dtype = dtype or ("bfloat16" if device.kind == "cuda" else "float32")
    cases = cases_of(options, dtype)
    if options.dry_run:
        entries = [document.dry_run(case, device, options) for case in cases]
        made: dict[str, Any] = {"device": device.name or device.kind, "cases": entries}
    else:
        if options.cases is None:
            document.require(cases[0], device, options)
        made = document.heading(device, dtype)
        if not options.json:
            report.print_heading(made)
        made["cases"] = []
        for case in cases:
            about = case.problem, xp, device, options.backward, options.budget
            gained = tune(*about) if options.tune else []
            entry = document.timed(case, xp, device, made["ceilings"], options)
            made["cases"].append({**entry, "tuned": gained} if options.tune else entry)
            entry = made["cases"][-1]
            if not options.json:
                report.print_case(entry, made["ceilings"])
    if options.json:
        print(json.dumps(made, indent=1))
    elif options.dry_run:
        report.print_dry_run(made)
    return int(any("error" in row for entry in made["cases"] for row in entry["rows"]))


def _calibrate(options: argparse.Namespace) -> int:
    from cuneigh._measure.arrays import here
    from cuneigh.cli.profile import report
    from cuneigh.cli.profile.calibrate import calibrate

    alone = ("input_size", "cases", "case", "dtype", "backward", "backend", "peers", "tune")
    for name in (*alone, "dry_run", "arch", *PROBLEM):
        if getattr(options, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--calibrate measures problems of its own, without {option}")
    xp, device = here()
    if device.kind != "cuda":
        raise RuntimeError("--calibrate is for GPUs, of which there is none here")
    if find_spec("scipy") is None:
        raise RuntimeError("--calibrate needs SciPy: pip install 'cuneigh[calibrate]'")
    made = {"device": device.name, **calibrate(xp, device)}
    if options.json:
        print(json.dumps(made, indent=1))
    else:
        report.print_calibration(made)
    return 0


def cases_of(options: argparse.Namespace, dtype: str) -> Sequence[Any]:
    """The problems that the options ask for."""
    from cuneigh._measure.cases import Case, problem_of, read

    if (options.cases is None) == (options.input_size is None):
        raise ValueError("either --input-size or --cases is needed, and not both")
    if options.cases is None:
        if options.case:
            raise ValueError("--case names problems of --cases, which is not given")
        return [Case("", problem_of(entry_of(options), dtype))]
    given = [name for name in PROBLEM if getattr(options, name) is not None]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"{option} describes one problem, but --cases has its own")
    cases = read(options.cases, dtype)
    unknown = set(options.case or ()) - {case.name for case in cases}
    if unknown:
        raise ValueError(f"{options.cases} has no case {sorted(unknown)[0]!r}")
    return [case for case in cases if not options.case or case.name in options.case]


def along(values: list[Any] | None, default: Any) -> Any:
    """What an option gives for the axes: one value for all of them, or one for each."""
    if values is None:
        return default
    return values[0] if len(values) == 1 else tuple(values)


def entry_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of one problem as an entry of a file of cases."""
    tokens = options.input_size
    return {
        "tokens": tokens,
        "batch": options.batch_size or 1,
        "heads": options.heads or 1,
        "kv_heads": options.heads_kv,
        "dim": options.dim or 64,
        "value_dim": options.dim_value,
        "kernel": along(options.window_size, tuple(tokens)),
        "stride": along(options.stride, 1),
        "dilation": along(options.dilation, 1),
        "causal": along(options.causal, False),
        "additional_keys": options.add_kv,
    }
