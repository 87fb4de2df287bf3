"""Sharded calls on several ranks against calls of one process: a program of its own.

    python -m helpers.ranks FOLDER BACKEND MODULE.SUITE WORLD [MODULE.SUITE WORLD ..]

forks the ranks of each suite of helpers.MODULE in turn, so that PyTorch is imported once.
BACKEND is gloo, for processes on the CPU that meet in FOLDER, or nccl, with a GPU for each rank.
What fails is printed, and the exit code is then 1. No suite runs on after one of its ranks failed,
nor for more than `SECONDS`.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import rank_suites

SECONDS = 120
GRACE = 5
"""Seconds for the other ranks to say what they saw of one that failed."""


def run_rank(method: str, backend: str, suite: Any, rank: int, world: int) -> int:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        rank_suites.DEVICE = "cuda"
    dist.init_process_group(
        backend,
        init_method=method,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
        device_id=torch.device("cuda", rank) if backend == "nccl" else None,
    )
    try:
        suite(rank, world)
        dist.barrier()
    except BaseException:
        print(f"{suite.__name__}, rank {rank} of {world}:\n{traceback.format_exc()}", flush=True)
        return 1
    dist.destroy_process_group()
    return 0


def run_suite(folder: Path, backend: str, suite: Any, world: int) -> bool:
    """Whether all ranks of a suite succeeded."""
    sys.stdout.flush()
    method = f"file://{folder}/{suite.__name__}-{world}" if backend == "gloo" else free_port()
    children: dict[int, int] = {}

    def end(*_: object) -> None:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(run_rank(method, backend, suite, rank, world))
        children[child] = rank
    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    codes = [0] * world
    while children:
        child, status = os.wait()
        codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
        if status:
            signal.alarm(GRACE)
    signal.alarm(0)
    if any(codes):
        print(f"{suite.__name__} of {world} ranks: exit codes {codes}")
    return not any(codes)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{found.getsockname()[1]}"


def suite_of(name: str) -> Any:
    module, suite = name.split(".")
    return getattr(importlib.import_module(f"helpers.{module}"), suite)


def main(folder: str, backend: str, *suites: str) -> int:
    pairs = [*zip(map(suite_of, suites[::2]), map(int, suites[1::2]), strict=True)]
    results = [run_suite(Path(folder), backend, suite, world) for suite, world in pairs]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
