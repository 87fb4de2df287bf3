"""`python -m cuneigh compile`: fill a cache of compiled kernels ahead of time, without a GPU."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from pathlib import Path
from typing import Any, get_args

from cuneigh import _backends, _jit
from cuneigh._device import of_capability
from cuneigh._problem import DTYPES, Operation, Problem
from cuneigh._progress import counting
from cuneigh._window import Axis
from cuneigh.cli.positive import positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile kernels ahead of time, without a GPU",
        description="Compile the kernels of the given operations, so that a machine with the same "
        "cache directory needs neither NVRTC nor time to compile them. Sizes, windows and strides "
        "are no part of a kernel; those for calls with and without dilation are compiled. Where an "
        "option takes several values, every combination is compiled.",
    )
    parser.add_argument(
        "--arch",
        nargs="+",
        action="extend",
        required=True,
        help="architectures of the GPUs, such as sm_80 or sm_90; kernels that need instructions "
        "of sm_90a are compiled for that",
    )
    parser.add_argument(
        "--rank", nargs="+", action="extend", type=int, choices=(1, 2, 3), required=True
    )
    parser.add_argument("--dtype", nargs="+", action="extend", choices=DTYPES, required=True)
    parser.add_argument("--head-dim", nargs="+", action="extend", type=positive(int), required=True)
    parser.add_argument("--value-dim", type=positive(int), help="default: the head_dim")
    parser.add_argument(
        "--operation",
        nargs="+",
        action="extend",
        choices=get_args(Operation),
        help="default: forward backward",
    )
    parser.add_argument(
        "--additional-keys", action="store_true", help="the calls pass additional keys"
    )
    parser.add_argument(
        "--rpb",
        choices=("same", "float32"),
        help="the calls pass a relative positional bias, of the query's dtype or of float32",
    )
    parser.add_argument(
        "--any-scale", action="store_true", help="the calls pass scales of 0 or below, too"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where the kernels go; set CUNEIGH_CACHE_DIR to it where they are used "
        "(default: the cache directory of this user)",
    )
    parser.add_argument(
        "--jobs", type=positive(int), metavar="N", help="default: the number of processors"
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="all that a thread of each kernel takes, and the advice of the assembler",
    )


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    compiled: dict[tuple[_jit.Kernel, str], _jit.Compiled] = {}
    try:
        directory = options.cache_dir or _jit.default_directory()
        for arch in options.arch:
            needed = (kernel for each in _problems(options) for kernel in _kernels(each, arch))
            kernels = list(dict.fromkeys(needed))
            with counting(f"compiling for {arch}", len(kernels)) as on_done:
                compiled |= _jit.precompile(
                    kernels, [arch], directory, jobs=options.jobs, on_done=on_done
                )
    except (_jit.CompilationError, OSError, ValueError) as error:
        print(f"python -m cuneigh compile: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    for (kernel, arch), result in compiled.items():
        resources = result.resources
        spilled = resources.spill_stores + resources.spill_loads
        print(
            f"{kernel.target(arch):8} {kernel.name:28} {resources.registers:3} registers"
            + (f", {spilled} bytes spilled" if spilled else "")
        )
        if options.verbose:
            print(f"{'':9}{resources.stack} bytes of stack, {resources.shared} of shared memory")
            for line in resources.advice:
                print(f"{'':9}{line}")
    print(f"{len(compiled)} kernels in {directory}, {seconds:.1f} s")
    return 0


def _problems(options: argparse.Namespace) -> list[Problem]:
    """Problems for every combination of options, not dilated and dilated; all sizes are small.

    The sign of a scale may be a part of a kernel, its value is not.
    """
    scales = (1.0, -1.0) if options.any_scale else (1.0,)
    operations = options.operation or ("forward", "backward")
    return [
        Problem(
            operation=operation,
            dtype=dtype,
            batch=1,
            heads=1,
            kv_heads=1,
            head_dim=head_dim,
            value_dim=options.value_dim or head_dim,
            axes=(Axis(dilation, dilation, 1, 1, dilation, False),) * rank,
            scale=scale,
            additional=1 if options.additional_keys else None,
            rpb_dtype=dtype if options.rpb == "same" else options.rpb,
        )
        for operation, dtype, rank, head_dim, dilation, scale in itertools.product(
            operations, options.dtype, options.rank, options.head_dim, (1, 2), scales
        )
    ]


def _kernels(problem: Problem, arch: str) -> list[_jit.Kernel]:
    """The kernels of every backend that computes `problem` on a GPU of architecture `arch`."""
    number = re.sub(r"\D", "", arch)  # of sm_90a
    device = of_capability(divmod(int(number or 0), 10))
    return [
        kernel
        for backend in _backends.BACKENDS
        if backend.unsupported(problem, device) is None
        for kernel in backend.kernels(problem, device)
    ]
