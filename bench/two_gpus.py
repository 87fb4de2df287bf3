"""One layout over two GPUs of a host against one of them: results, times, and bytes exchanged.

    python bench/two_gpus.py --output bench/results/two-gpus.json

Each case is cut in two along its first token axis. Every rank computes the whole layout on its own
GPU and then its shard, forward and backward in bfloat16; a time is that of one of three steps in a
row, the median of the slower rank.
`speedup` is one GPU's time over that of two. `part` is the attention of a rank's queries with all
their keys at hand, so that the rest of two GPUs' time is the exchange. With `--pieces`, `together`
computes all queries of a rank after the exchange, and `apart` those that need no message beside it.
`bytes` is what a rank sends in the forward pass, and `floor` what of the other's keys and values
its queries see. Errors are the largest of both ranks, in proportion to the largest number.

A rank that fails ends the other, and what was measured until then is printed. Nothing runs for
longer than `--seconds`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import cuneigh
from cuneigh._device import cuda
from cuneigh._measure.provenance import provenance
from cuneigh._window import Axis
from cuneigh.torch import distributed
from cuneigh.torch.distributed import _keys, _task

VOLUME = {"name": "volume", "tokens": [64, 128, 256], "heads": 16, "dim": 64, "kernel": [9, 17, 17]}
CASES = ["flux4k-na", "volume"]
CALLS = {2: (cuneigh.na2d, distributed.na2d), 3: (cuneigh.na3d, distributed.na3d)}
RANKS = 2
STEPS = 3
"""Steps that are timed together, as in a program: the host prepares one beside the one before."""
PATIENCE = timedelta(seconds=120)
"""How long ranks wait for each other: one may compile a kernel that the other does not need."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--backend", help="of both; the best one that runs it if not given")
    parser.add_argument("--pieces", action="store_true", help="time queries in pieces as well")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seconds", type=int, default=480, help="end after so many; default 480")
    options = parser.parse_args()
    if torch.cuda.device_count() < RANKS:
        parser.error(f"{RANKS} GPUs are needed, but PyTorch sees {torch.cuda.device_count()}")
    until = time.monotonic() + options.seconds
    # Of this process, so that it outlives a rank that fails.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = torch.multiprocessing.spawn(run, (options, store.port), nprocs=RANKS, join=False)
    while not ranks.join(timeout=1):  # raises what a rank did, and ends the other
        if time.monotonic() > until:
            for process in ranks.processes:
                process.kill()
            raise SystemExit(f"two_gpus.py: not done after {options.seconds} s")


def run(rank: int, options: Any, port: int) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", store=store, rank=rank, world_size=RANKS, timeout=PATIENCE, device_id=device
    )
    mesh = init_device_mesh("cuda", (RANKS,), mesh_dim_names=("x",))
    known = json.loads((Path(__file__).parent / "cases.json").read_text())
    cases = {case["name"]: case for case in [*known, VOLUME]}
    document: dict[str, Any] = {**provenance(cuda(rank)), "torch": torch.__version__}
    document["cases"] = {}
    for name in options.case:
        document["cases"][name] = entry = measured(cases[name], mesh, rank, options)
        if rank == 0:
            print(name, json.dumps(entry, indent=1), flush=True)
            if options.output:
                options.output.write_text(json.dumps(document, indent=1) + "\n")
    dist.destroy_process_group()


class Alone(NamedTuple):
    """What one GPU has of a case."""

    local: list[torch.Tensor]
    """The shards of query, key, value and the gradient of the output."""
    expected: list[torch.Tensor]
    """The shards of the output and of the gradients."""
    milliseconds: float
    part_milliseconds: float
    """Of the shard's queries, with the keys that they see."""


def alone(case: dict[str, Any], mine: slice, given: dict[str, Any], repeats: int) -> Alone:
    """The whole layout on each GPU. Its arrays, 17 GB of the volume, are gone afterwards."""
    torch.manual_seed(0)
    shape = (1, *case["tokens"], case["heads"], case["dim"])
    whole = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    local = [array[:, mine].clone() for array in whole]
    of_one, _ = CALLS[len(case["tokens"])]
    one = step(of_one, whole, given)
    expected = [array[:, mine].clone() for array in one()]
    one_ms = milliseconds(one, repeats)
    rows = halo(case, mine.stop - mine.start)
    keys = slice(max(mine.start - rows, 0), min(mine.stop + rows, shape[1]))
    cuts = (mine, keys, keys, mine)
    arrays = [array.detach()[:, cut].clone() for array, cut in zip(whole, cuts, strict=True)]
    starts = {"query_start": mine.start, "key_start": keys.start}
    rest = (0,) * (len(case["tokens"]) - 1)
    at = {name: (start, *rest) for name, start in starts.items()}
    part = step(of_one, arrays, {**given, "layout": tuple(case["tokens"]), **at})
    return Alone(local, expected, one_ms, milliseconds(part, repeats))


def measured(case: dict[str, Any], mesh: Any, rank: int, options: Any) -> dict[str, Any]:
    tokens = case["tokens"]
    own = tokens[0] // RANKS
    mine = slice(rank * own, (rank + 1) * own)
    given = {"kernel_size": tuple(case["kernel"]), "backend": options.backend}
    local, expected, one_ms, part_ms = alone(case, mine, given, options.repeats)
    axes = ("x", *[None] * (len(tokens) - 1))
    sharding = distributed.Sharding(mesh, axes, layout=tokens)
    _, of_two = CALLS[len(tokens)]
    two = step(of_two, local, {**given, "sharding": sharding})
    with counted() as sent:
        got = two()
    names = "output", "query", "key", "value"
    entry: dict[str, Any] = {
        "largest_error": {
            name: largest((a.float() - b.float()).abs().max() / b.float().abs().max())
            for name, a, b in zip(names, got, expected, strict=True)
        },
        "bit_for_bit": {
            name: not largest((a != b).any())
            for name, a, b in zip(names, got, expected, strict=True)
        },
    }
    del got, expected
    entry["one_gpu_ms"] = one_ms
    entry["part_ms"] = part_ms
    entry["two_gpus_ms"] = milliseconds(two, options.repeats)
    entry["speedup"] = entry["one_gpu_ms"] / entry["two_gpus_ms"]
    if options.pieces:
        worth = _task.WORTH_SPLITTING
        for name, _task.WORTH_SPLITTING in (("together_ms", 1 << 100), ("apart_ms", 0)):
            entry[name] = milliseconds(two, options.repeats)
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
    """Of a step: the median over repeats of the slowest rank's time."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        for _ in range(STEPS):
            run_step()
        end.record()
        torch.cuda.synchronize()
        times.append(largest(begin.elapsed_time(end) / STEPS))
    return median(times[2:])


def largest(number: Any) -> float:
    """The largest of what the ranks have."""
    found = torch.as_tensor(number, dtype=torch.float64, device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank sends by every exchange."""
    sent: list[int] = []
    plain = _keys.Exchange

    def counting(call: Any, group: Any, message: Any, received: Any) -> Any:
        sent.append(message.numbers.nbytes)
        return plain(call, group, message, received)

    _keys.Exchange = counting
    try:
        yield sent
    finally:
        _keys.Exchange = plain


def halo(case: dict[str, Any], own: int) -> int:
    """Rows of keys of the first rank that queries of the second see."""
    length = case["tokens"][0]
    begin, _ = Axis(length, length, case["kernel"][0], 1, 1, False).windows()
    return own - int(begin[own:].min())


def floor(case: dict[str, Any], own: int) -> int:
    """Bytes of these keys and their values."""
    return halo(case, own) * math.prod(case["tokens"][1:]) * case["heads"] * case["dim"] * 2 * 2


if __name__ == "__main__":
    main()
