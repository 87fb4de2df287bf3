"""`python -m cuneigh show`: which keys a query sees, and how the planner cuts the layout for it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cuneigh import _backends
from cuneigh._parameters import neighborhood_axes, part_arguments, window_arguments
from cuneigh._problem import DTYPES
from cuneigh.cli.devices import device_of
from cuneigh.cli.profile import SHORT, add_problem_options, along


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "show",
        help="draw which keys a query sees, and how the planner cuts the layout",
        description="Draw which keys a query sees: in the terminal, as a picture, or as a page in "
        "which a query, window, stride, dilation, causality and borders are changed by hand. With "
        "--plan also the queries of its block and the boxes of keys that the block loads.",
        epilog="example: python -m cuneigh show -i 32 32 -w 7 7 -q 3 29 --plan --output plan.png",
    )
    add_problem_options(parser)
    parser.add_argument(
        "-q", "--query", nargs="+", type=int, metavar="N", help="its token; default: the middle"
    )
    parser.add_argument(
        "--border",
        nargs="+",
        metavar="NAME",
        help="shift (the default), cut or wrap, for each axis",
    )
    parser.add_argument(
        "--plan", action="store_true", help="show how the planner cuts the forward pass"
    )
    names = [backend.NAME for backend in _backends.BACKENDS if backend.NAME != "cpu"]
    parser.add_argument("--backend", choices=names, help="of --plan; default: the fastest")
    parser.add_argument("--arch", metavar="SM", help="of --plan; default: sm_90")
    parser.add_argument("--dtype", choices=(*DTYPES, *SHORT), help="of --plan; default: bfloat16")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a picture: .png, .svg or .pdf"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to play with")


def run(options: argparse.Namespace) -> int:
    try:
        _run(options)
    except ImportError as error:
        message = f"{error.name} is missing; pip install 'cuneigh[pictures]' brings it"
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        message = str(error).removeprefix("show: ")
    else:
        return 0
    print(f"python -m cuneigh show: {message}", file=sys.stderr)
    return 2


PLAN = ("backend", "arch", "dtype", "batch_size", "heads", "heads_kv", "dim", "dim_value", "add_kv")
"""The options that matter for --plan alone."""


def _run(options: argparse.Namespace) -> None:
    # Here, and not above, for every command imports this module.
    from cuneigh.cli.show import page, picture, terminal
    from cuneigh.cli.show.scene import scene_of

    if options.input_size is None:
        raise ValueError("--input-size is needed")
    given = [name for name in PLAN if getattr(options, name) is not None]
    if given and not options.plan:
        raise ValueError(f"--{given[0].replace('_', '-')} matters with --plan alone")
    tokens = tuple(options.input_size)
    if len(tokens) > 3:
        raise ValueError(f"there are {len(tokens)} token axes, but 1 to 3 are possible")
    window = window_arguments(
        "show",
        len(tokens),
        along(options.window_size, tokens),
        along(options.stride, 1),
        along(options.dilation, 1),
        along(options.causal, False),
    )
    if options.plan and options.border:
        raise ValueError("--plan draws windows that are shifted inwards alone; leave out --border")
    border = along(options.border, "shift")
    part = part_arguments("show", len(tokens), border, None, 0, 0)
    axes = neighborhood_axes("show", tokens, window, part=part)
    planned = _plan(options) if options.plan else None
    scene = scene_of(axes, options.query, planned)
    if options.output:
        picture.write(scene, options.output)
        print(f"wrote {options.output}")
    if options.html:
        page.write(scene, options.html)
        print(f"wrote {options.html}")
    if not options.output and not options.html:
        terminal.draw(scene)


def _plan(options: argparse.Namespace) -> Any:
    """The plan of the forward pass, by the fastest backend that has one unless one is named."""
    from cuneigh._measure.cases import problem_of
    from cuneigh._programs import rehearse
    from cuneigh.cli.profile import entry_of

    dtype = SHORT.get(options.dtype, options.dtype) or "bfloat16"
    problem = problem_of(entry_of(options), dtype, "show")
    device = device_of(options.arch or "sm_90")
    able = [each for each in _backends.BACKENDS if each.unsupported(problem, device) is None]
    able.sort(key=lambda backend: backend.predicted_ms(problem, device))
    for name in [options.backend] if options.backend else [backend.NAME for backend in able]:
        _, plans = rehearse(problem, device, name)
        if plans:
            return plans[0]
    raise ValueError(f"--backend {options.backend} has no plan: some threads take each query")
