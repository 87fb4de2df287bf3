"""Sharded calls on several ranks against calls of one process: a program of its own.

    python -m helpers.ranks FOLDER SUITE WORLD [SUITE WORLD ..]

forks the ranks of each suite of `helpers.rank_suites` in turn, so that PyTorch is imported once.
They meet in FOLDER. What fails is printed, and the exit code is then 1.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import rank_suites


def run_rank(folder: Path, suite: str, rank: int, world: int) -> int:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{suite}-{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        getattr(rank_suites, suite)(rank, world)
    except BaseException:
        print(f"suite {suite}, rank {rank} of {world}:\n{traceback.format_exc()}", flush=True)
        return 1
    dist.barrier()
    dist.destroy_process_group()
    return 0


def run_suite(folder: Path, suite: str, world: int) -> bool:
    """Whether all ranks of a suite succeeded."""
    sys.stdout.flush()
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(run_rank(folder, suite, rank, world))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        print(f"suite {suite} of {world} ranks: exit codes {codes}")
    return not any(codes)


def main(folder: str, *suites: str) -> int:
    pairs = zip(suites[::2], map(int, suites[1::2]), strict=True)
    results = [run_suite(Path(folder), suite, world) for suite, world in pairs]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
