"""One layout over two GPUs of a host against one of them: results, times, and bytes exchanged.

    python bench/two_gpus.py --output bench/results/two-gpus.json

Each case is cut in two along its first token axis. Every rank computes the whole layout on its own
GPU and then its shard, forward and backward in bfloat16; a time is the median of the slower rank.
`speedup` is one GPU's time over that of two. `together` computes all queries of a rank after the
exchange, in place of those that need no message beside it. `bytes` is what a rank sends in the
forward pass, and `floor` what of the other's keys and values its queries see.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cuneigh
from cuneigh._window import Axis
from cuneigh.torch import distributed
from cuneigh.torch.distributed import _exchange, _task

VOLUME = {"name": "volume", "tokens": [64, 128, 256], "heads": 16, "dim": 64, "kernel": [9, 17, 17]}
CASES = ["flux4k-na", "volume"]
CALLS = {2: (cuneigh.na2d, distributed.na2d), 3: (cuneigh.na3d, distributed.na3d)}
RANKS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backend", help="of both; the best one that runs it if not given")
    options = parser.parse_args()
    torch.multiprocessing.spawn(run, (options,), nprocs=RANKS)


def run(rank: int, options: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", 29511, RANKS, rank == 0)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cuda", (RANKS,), mesh_dim_names=("x",))
    known = json.loads((Path(__file__).parent / "cases.json").read_text())
    cases = {case["name"]: case for case in [*known, VOLUME]}
    document: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    document["cases"] = {name: measured(cases[name], mesh, rank, options) for name in CASES}
    if rank == 0:
        print(json.dumps(document, indent=1))
        if options.output:
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()


def measured(case: dict[str, Any], mesh: Any, rank: int, options: Any) -> dict[str, Any]:
    tokens, heads, dim = case["tokens"], case["heads"], case["dim"]
    own = tokens[0] // RANKS
    mine = slice(rank * own, (rank + 1) * own)
    torch.manual_seed(0)
    shape = (1, *tokens, heads, dim)
    whole = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    local = [array[:, mine].clone() for array in whole]
    axes = ("x", *[None] * (len(tokens) - 1))
    sharding = distributed.Sharding(mesh, axes, layout=tokens)
    of_one, of_two = CALLS[len(tokens)]
    given = {"kernel_size": tuple(case["kernel"]), "backend": options.backend}
    one = step(of_one, whole, given)
    two = step(of_two, local, {**given, "sharding": sharding})
    expected = [array[:, mine].clone() for array in one()]
    with counted() as sent:
        got = two()
    errors = {
        name: float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for name, a, b in zip(("output", "query", "key", "value"), got, expected, strict=True)
    }
    entry: dict[str, Any] = {"largest_error": errors}
    entry["one_gpu_ms"] = milliseconds(one, options.repeats)
    entry["two_gpus_ms"] = milliseconds(two, options.repeats)
    entry["speedup"] = entry["one_gpu_ms"] / entry["two_gpus_ms"]
    worth, _task.WORTH_SPLITTING = _task.WORTH_SPLITTING, 1 << 100
    entry["together_ms"] = milliseconds(two, options.repeats)
    _task.WORTH_SPLITTING = worth
    entry["bytes"] = sent[0]
    entry["floor"] = floor(case, own)
    return entry


def step(call: Callable[..., Any], arrays: list[Any], given: dict[str, Any]) -> Callable[[], Any]:
    """A forward and its gradients."""
    *inputs, incoming = arrays
    inputs = [array.requires_grad_() for array in inputs]

    def run_step() -> list[torch.Tensor]:
        output = call(*inputs, **given)
        return [output.detach(), *torch.autograd.grad(output, inputs, incoming)]

    return run_step


def milliseconds(run_step: Callable[[], Any], repeats: int) -> float:
    """The median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        run_step()
        end.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(begin.elapsed_time(end), device="cuda")
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        times.append(float(slowest))
    return median(times[2:])


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank sends by every exchange."""
    sent: list[int] = []
    plain = dist.all_to_all_single

    def counting(received: Any, numbers: Any, *rest: Any, **named: Any) -> Any:
        sent.append(numbers.numel() * numbers.itemsize)
        return plain(received, numbers, *rest, **named)

    _exchange.dist.all_to_all_single = counting
    try:
        yield sent
    finally:
        _exchange.dist.all_to_all_single = plain


def floor(case: dict[str, Any], own: int) -> int:
    """Bytes of the keys and values of the first rank that queries of the second see."""
    length, *others = case["tokens"]
    axis = Axis(length, length, case["kernel"][0], 1, 1, False)
    begin, _ = axis.windows()
    rows = own - int(begin[own:].min())
    return rows * math.prod(others) * case["heads"] * case["dim"] * 2 * 2


if __name__ == "__main__":
    main()
