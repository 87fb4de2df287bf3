"""What a call of `fused` takes of the device's memory, against the number of tokens.

    python bench/memory.py --output bench/results/memory.json

Peaks are those of CuPy's allocations during a call, results included, in units of 512 bytes.
`forward` is compared with the output and lse, `backward` with the gradients in float32 once, delta
and 64 MiB. `second_order` is a gradient of gradients in PyTorch, whose allocations count there. It
is compared with the gradients and a tangent of the output in float32 once, the numbers of every
query, and 64 MiB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cupy
import torch
from figures import update as draw_figures

import cuneigh
from cuneigh._device import cuda
from cuneigh._measure.arrays import normal
from cuneigh._measure.clock import GpuClock
from cuneigh._measure.provenance import provenance

HEADS, DIM = 8, 64
MIB = 1 << 20
CASES: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...]]] = {
    "1-D, window 512": ([(1 << power,) for power in range(12, 20, 2)], (512,)),
    "2-D, window 24x24": ([(side, side) for side in (64, 128, 256, 512)], (24, 24)),
    "3-D, window 8x8x8": ([(16, side, side) for side in (16, 32, 64, 128)], (8, 8, 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    arguments = parser.parse_args()
    document: dict[str, Any] = {**provenance(cuda(0)), "heads": HEADS, "dim": DIM, "cases": []}
    print(f"{'':28} tokens  forward, backward and second order: MiB (allowed)")
    for name, (layouts, window) in CASES.items():
        for tokens in layouts:
            for rpb in (False, True):
                figures = measure(tokens, window, rpb)
                label = name + (", rpb" if rpb else "")
                document["cases"].append({"case": label, "tokens": tokens, **figures})
                mib = {key: value / MIB for key, value in figures.items()}
                columns = (
                    f"{mib[name]:8.1f} ({mib[f'{name}_allowed']:8.1f})"
                    for name in ("forward", "backward", "second_order")
                )
                print(f"{label:26} {figures['queries']:8} {' '.join(columns)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(arguments.output)


def measure(tokens: tuple[int, ...], window: tuple[int, ...], with_rpb: bool) -> dict[str, int]:
    rank = len(tokens)
    shape = (1, *tokens, HEADS, DIM)
    query, key, value, grad_output = (normal(cupy, shape, "bfloat16", seed) for seed in range(4))
    keywords: dict[str, Any] = {"kernel_size": window, "backend": "fused"}
    if with_rpb:
        keywords["rpb"] = cupy.zeros((HEADS, *(2 * size - 1 for size in window)), "float32")
    forward = getattr(cuneigh, f"na{rank}d")
    backward = getattr(cuneigh, f"na{rank}d_backward")
    output, lse = forward(query, key, value, return_lse=True, **keywords)
    bias_bytes = keywords["rpb"].nbytes if with_rpb else 0
    numbers_bytes = 8 * lse.nbytes  # lse, delta and their tangents, of which some are kept twice
    return {
        "queries": query.size // (HEADS * DIM),
        "forward": GpuClock().peak(lambda: forward(query, key, value, return_lse=True, **keywords)),
        "forward_allowed": output.nbytes + lse.nbytes,
        "backward": GpuClock().peak(
            lambda: backward(grad_output, query, key, value, output, lse, **keywords)
        ),
        "backward_allowed": 4 * 3 * query.size + bias_bytes + lse.nbytes + 64 * MIB,
        "second_order": second_order(forward, shape, keywords),
        "second_order_allowed": 4 * 4 * query.size + bias_bytes + numbers_bytes + 64 * MIB,
    }


def second_order(forward: Any, shape: tuple[int, ...], keywords: dict[str, Any]) -> int:
    """The peak of a gradient of gradients beyond what is there before."""
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    if "rpb" in keywords:
        keywords = {**keywords, "rpb": torch.from_dlpack(keywords["rpb"]).requires_grad_()}
        leaves.append(keywords["rpb"])
    output = forward(*leaves[:3], **keywords)
    gradients = torch.autograd.grad(output, leaves, torch.ones_like(output), create_graph=True)
    ways = [torch.ones_like(leaf) for leaf in leaves]

    def call() -> Any:
        return torch.autograd.grad(gradients, leaves, ways, retain_graph=True)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
