"""Weak scaling of layouts in shards: every byte of eight gloo processes, and hundreds on paper.

    python bench/shards.py --output bench/results/shards.json

`counted` runs small layouts, forward and backward, with each rank's shard of one size, and compares
the bytes that ranks hand to the all-to-all with those of their plans, and with the floor: the keys
and values of other ranks that some query of the rank sees. `paper` has the same plans for shards of
a real size: bytes and time of halos of the rank with the most, from the measured bandwidth of
NVLink and the nominal one of a network, against the time of its attention at a measured rate.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cuneigh._shards.axis import Shards
from cuneigh._shards.plan import Plan
from cuneigh._window import Axis
from cuneigh.torch import distributed
from cuneigh.torch.distributed import _keys

RANKS = 8
GRIDS = [(8, 1, 1), (4, 2, 1), (2, 2, 2)]
BORDERS = ["shift", "wrap"]
SMALL = {"shard": (4, 6, 6), "kernel": (3, 5, 5), "heads": 2, "dim": 4}
"""A shard, the window, and the heads of the layouts that are run."""

PAPER = {"shard": (32, 128, 256), "kernel": (9, 17, 17), "heads": 16, "dim": 64}
PAPER_GRIDS = [(1, 1, 2), (2, 2, 2), (8, 1, 1), (4, 4, 4), (64, 1, 1), (8, 8, 8), (512, 1, 1)]
RATES = {"forward": 421e12, "backward": 263e12}
"""Floating-point operations a second: those of hunyuan-na, `hopper` on an H200 (`h200.json`)."""
LATENCY = 60e-6
BANDWIDTHS = {"NVLink, 234 GB/s": 234e9, "network, 50 GB/s": 50e9}
"""Of one direction. That of NVLink was measured (64 MB each way), the other is a nominal one."""


def plan_of(grid: tuple[int, ...], border: str, rank: int, of: dict[str, Any]) -> Plan:
    axes = []
    for count, size, kernel in zip(grid, of["shard"], of["kernel"], strict=True):
        length = count * size
        axis = Axis(length, length, kernel, 1, 1, False, border)  # type: ignore[arg-type]
        axes.append(Shards(axis, (size,) * count))
    return Plan(tuple(axes), rank)


def floor_of(plan: Plan) -> int:
    """Tokens of other ranks that some query of the rank sees, found key by key."""
    seen = []
    for shards, shard in zip(plan.axes, plan.place(plan.rank), strict=True):
        part = shards.part(shard, 0, shards.layout)
        begin, end = part.windows()
        tokens = {
            int(t) % shards.layout for a, b in zip(begin, end, strict=True) for t in range(a, b)
        }
        seen.append(len(tokens))
    return math.prod(seen) - plan.own.tokens


def tokens_of(messages: Any) -> int:
    return sum(box.tokens for boxes in messages for box in boxes)


# Eight processes


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    handed: list[list[int]] = []
    plain = _keys.Exchange

    def counting(call: Any, group: Any, sent: Any, received: Any) -> Any:
        handed.append([split * sent.numbers.itemsize for split in sent.splits])
        return plain(call, group, sent, received)

    _keys.Exchange = counting
    document = []
    for grid in GRIDS:
        mesh = init_device_mesh("cpu", grid, mesh_dim_names=("x", "y", "z"))
        for border in BORDERS:
            plan = plan_of(grid, border, rank, SMALL)
            shape = (1, *SMALL["shard"], SMALL["heads"], SMALL["dim"])
            arrays = [torch.randn(shape, requires_grad=True) for _ in range(3)]
            handed.clear()
            sharding = distributed.Sharding(mesh, ("x", "y", "z"))
            window = {"kernel_size": SMALL["kernel"], "border": border}
            distributed.na3d(*arrays, **window, sharding=sharding).sum().backward()
            document.append({"handed": [*map(sum, handed)], "floor": floor_of(plan)})
            document[-1]["messages"] = [sum(map(bool, one)) for one in handed]
            document[-1]["planned"] = [tokens_of(plan.sent), tokens_of(plan.received)]
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, document)
    if rank == 0:
        Path(folder, "counts.json").write_text(json.dumps(gathered))
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


def counted() -> list[dict[str, Any]]:
    """Bytes of all ranks together, which must be those of the plans and of the floor."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(RANKS):
            if not (child := os.fork()):
                try:
                    run_rank(rank, folder)
                finally:
                    os._exit(not Path(folder, f"done-{rank}").exists())
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        ranks = json.loads(Path(folder, "counts.json").read_text())
    each = 2 * SMALL["heads"] * SMALL["dim"] * 4  # bytes of a token's key and value
    found = []
    for number, (grid, border) in enumerate((g, b) for g in GRIDS for b in BORDERS):
        own = [rank[number] for rank in ranks]
        forward, backward = (sum(of) for of in zip(*[one["handed"] for one in own], strict=True))
        floor = each * sum(one["floor"] for one in own)
        for one in own:
            assert one["handed"] == [each * tokens for tokens in one["planned"]], one
        messages = [sum(of) for of in zip(*[one["messages"] for one in own], strict=True)]
        entry = {"grid": grid, "border": border, "forward_bytes": forward}
        found.append({**entry, "backward_bytes": backward, "floor": floor, "messages": messages})
        print(found[-1], flush=True)
    return found


# On paper


def paper() -> list[dict[str, Any]]:
    pairs = math.prod(PAPER["shard"]) * math.prod(PAPER["kernel"]) * PAPER["heads"]
    forward = 4 * pairs * PAPER["dim"]
    compute = {"forward": forward / RATES["forward"], "backward": 2.5 * forward / RATES["backward"]}
    found = []
    for grid in PAPER_GRIDS:
        middle = int(np.ravel_multi_index([count // 2 for count in grid], grid))
        plan = plan_of(grid, "shift", middle, PAPER)
        tokens = max(tokens_of(plan.sent), tokens_of(plan.received))
        size = tokens * PAPER["heads"] * PAPER["dim"] * 2 * 2
        inner = plan.pieces[0].queries.tokens / plan.own.tokens
        entry: dict[str, Any] = {"grid": grid, "gpus": math.prod(grid), "halo_mb": size / 1e6}
        entry["messages"] = sum(map(bool, plan.received))
        entry["inner_queries"] = inner
        for name, bandwidth in BANDWIDTHS.items():
            moved = LATENCY + size / bandwidth
            time = sum(max(inner * of, moved) + (1 - inner) * of for of in compute.values())
            entry[name] = {"exchange_ms": moved * 1e3, "efficiency": sum(compute.values()) / time}
        found.append(entry)
        print(entry, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    options = parser.parse_args()
    document = {"counted": counted(), "paper": paper()}
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
