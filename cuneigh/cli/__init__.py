"""The command line. A command is a module with `add_parser(subparsers)` and `run(options)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cuneigh.cli import compile, demo, doctor, profile, show

COMMANDS = {
    "doctor": doctor,
    "demo": demo,
    "show": show,
    "profile": profile,
    "compile": compile,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cuneigh",
        description="Neighborhood attention for NumPy, CuPy, PyTorch and JAX arrays.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    options = parser.parse_args(arguments)
    exit_code: int = COMMANDS[options.command].run(options)
    return exit_code
