"""Long windows beside FlashAttention-4 on one GPU, by turns: who is faster on the same card.

    python bench/beside.py --output bench/results/beside.json

GPUs of one kind differ by several per cent at the power limit, more than what lies between us and
the peer. So each contender runs `ROUNDS` times, one after the other, and the ratio is that of the
medians. In one dimension the peer is its `window_size` kernel, of which the deterministic one is
what we do; in more it is its block-sparse kernel, on tokens already in the order of its tiles, and
with the permutations that bring arrays into that order. Results are compared before anything is
timed. It takes `flash-attn-4`, and PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy

from cuneigh._device import cuda
from cuneigh._measure import arrays, ours, peers
from cuneigh._measure.cases import read
from cuneigh._measure.clock import GpuClock
from cuneigh._measure.peers.clock import TorchClock
from cuneigh._measure.provenance import provenance
from cuneigh._problem import Problem

ROOT = Path(__file__).resolve().parent
CASES = ("dense32k", "seq32k-w2k", "seq32k-w2k-causal", "flux4k-gna", "hunyuan-gna")
"""Where it comes near us."""
ROUNDS, BUDGET_MS = 5, 150.0

Contender = tuple[GpuClock, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--seconds", type=float, default=500.0, help="begin no case after these")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    document: dict[str, Any] = {**provenance(cuda(0)), "rounds": ROUNDS, "cases": {}}
    for name, problem in read(ROOT / "cases.json", "bfloat16"):
        if name not in options.cases:
            continue
        if time.monotonic() > end:
            print(f"no time left for {name}", flush=True)
            continue
        document["cases"][name] = compare(name, problem)
        if options.output:
            options.output.write_text(json.dumps(document, indent=1) + "\n")


def compare(name: str, problem: Problem) -> dict[str, Any]:
    """The times of ours and of each peer, by kind."""
    operands = arrays.operands_of(cupy, problem)
    grad_output = arrays.grad_output_of(cupy, problem)
    ours.check(problem, operands, grad_output, None)
    right = ours.step(problem, operands, grad_output, None)
    forward: dict[str, Contender] = {}
    step: dict[str, Contender] = {}
    forward["cuneigh"] = GpuClock(), lambda: ours.forward(problem, operands, None)
    step["cuneigh"] = GpuClock(), lambda: ours.step(problem, operands, grad_output, None)
    given = peers.given_to(problem, operands, grad_output)
    figures: dict[str, Any] = {"left out": {}}
    for peer in peers.PEERS:
        if not peer.startswith("FlashAttention-4"):
            continue
        try:
            calls = peers.PEERS[peer](given)
            peers.check_forward(problem, operands, calls)
            if calls.step:
                peers.check_step(problem, operands, grad_output, right, calls)
        except Exception as error:  # whatever it is, the others go on
            figures["left out"][peer] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        forward[peer] = TorchClock(), calls.forward
        if calls.step:
            step[peer] = TorchClock(), calls.step
    for kind, contenders in (("forward", forward), ("forward_backward", step)):
        rounds: dict[str, list[float]] = {peer: [] for peer in contenders}
        for _ in range(ROUNDS):
            for peer, (clock, call) in contenders.items():
                rounds[peer].append(clock.measure(call, BUDGET_MS).best)
        mine = statistics.median(rounds["cuneigh"])
        figures[kind] = {}
        for peer, times in rounds.items():
            ms = statistics.median(times)
            figures[kind][peer] = {"ms": ms, "rounds_ms": times, "ratio": round(ms / mine, 4)}
            print(f"{name:18} {kind:16} {peer:48} {ms:9.4f} ms {ms / mine:6.3f}", flush=True)
    print("\n".join(f"{peer}: {why}" for peer, why in figures["left out"].items()), flush=True)
    return figures


if __name__ == "__main__":
    main()
