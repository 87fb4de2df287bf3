"""Every case of `cases.json`, in bfloat16, on every GPU backend: checked, then timed.

    python bench/h200.py --output bench/results/h200.json

`forward_backward` is the forward with its lse and the gradients of query, key and value. A backend
is left out of a case that would take it longer than `--longest` ms by its measured rate. `chosen`
names the backends that a call without a name takes. Where every query sees every key, `cudnn` is
PyTorch's attention by cuDNN on the same arrays, in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
from figures import update as draw_figures

from cuneigh._backends import BACKENDS, choose
from cuneigh._device import cuda
from cuneigh._measure import arrays, ours
from cuneigh._measure.cases import read
from cuneigh._measure.clock import GpuClock, copy_gbps
from cuneigh._measure.provenance import provenance
from cuneigh._problem import Operands, Problem

ROOT = Path(__file__).resolve().parent
measure = GpuClock().measure

NAIVE_TFLOPS = 7.0
"""What the naive kernels reach, which says how long they would take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--longest", type=float, default=50.0, help="ms of one naive call at most")
    parser.add_argument("--cases", nargs="+", help="names of the cases to run; default: all")
    arguments = parser.parse_args()
    peers = json.loads((ROOT / "peers-h200.json").read_text())["cases"]
    ceiling = {"copy_gbps": copy_gbps()}
    document: dict[str, Any] = {**provenance(cuda(0)), **ceiling, "cases": {}}
    for name, problem in read(ROOT / "cases.json", "bfloat16"):
        if arguments.cases and name not in arguments.cases:
            continue
        results = document["cases"][name] = run(problem, arguments.longest)
        for backend, figures in results.items():
            if backend == "chosen":
                continue
            for kind, figure in figures.items():
                if "ms" not in figure:
                    continue
                best = peers.get(name, {}).get(kind, {}).get("best_peer_ms")
                cutlass = (
                    peers.get(name, {}).get(kind, {}).get("peers", {}).get("natten-cutlass-fna", {})
                )
                versus = f"  best peer {best:.3f} ms" if best else ""
                versus += f", natten-cutlass-fna {cutlass['ms']:.3f} ms" if cutlass else ""
                versus += "  chosen" if backend == results["chosen"].get(kind) else ""
                print(
                    f"{name:18} {backend:6} {kind:16} {min(figure['ms'], figure['graph_ms']):9.4f} "
                    f"ms {figure['tflops']:6.1f} TFLOP/s {figure['gbps']:6.0f} GB/s{versus}",
                    flush=True,
                )
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")
        draw_figures(arguments.output)


def run(problem: Problem, longest: float) -> dict[str, dict[str, Any]]:
    """The figures of one case, by backend and kind."""
    operands = arrays.operands_of(cupy, problem)
    grad_output = arrays.grad_output_of(cupy, problem)
    results: dict[str, dict[str, Any]] = {}
    naive_ms = problem.flops() / NAIVE_TFLOPS / 1e9

    def both(backend: str) -> None:
        ours.step(problem, operands, grad_output, backend)

    device = cuda(0)
    takes = {
        backend.NAME: [
            kind
            for kind, asked in (("forward", problem), ("forward_backward", problem.gradient))
            if backend.unsupported(asked, device) is None
        ]
        for backend in BACKENDS
    }
    for backend in ("naive", "hopper", "fused"):
        if (backend == "naive" and naive_ms > longest) or "forward" not in takes[backend]:
            continue
        ours.check(problem, operands, None, backend)
        figures = results[backend] = {
            "forward": timed(
                problem, lambda backend=backend: ours.forward(problem, operands, backend)
            )
        }
        slow = backend == "naive" and 3.5 * naive_ms > longest
        if "forward_backward" in takes[backend] and not slow:
            ours.check(problem, operands, grad_output, backend)
            figures["forward_backward"] = timed(
                problem, lambda backend=backend: both(backend), passes=3.5
            )
    results["chosen"] = {
        "forward": choose(problem, device, None).NAME,
        "forward_backward": choose(problem.gradient, device, None).NAME,
    }
    sees_all = all(axis.kernel_size == axis.length and not axis.is_causal for axis in problem.axes)
    if sees_all and (figures := cudnn(problem, operands, grad_output)):
        results["cudnn"] = figures
    return results


def cudnn(problem: Problem, operands: Operands, grad_output: Any) -> dict[str, Any]:
    """The times of full attention by cuDNN; none where PyTorch is not installed."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    dim = problem.head_dim
    query, key, value, gradient = (
        torch.from_dlpack(array).reshape(problem.batch, -1, problem.heads, dim).transpose(1, 2)
        for array in (*operands[:3], grad_output)
    )
    inputs = [array.detach().requires_grad_() for array in (query, key, value)]

    def forward() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def both() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = torch.nn.functional.scaled_dot_product_attention(*inputs)
            torch.autograd.grad(output, inputs, gradient)

    figures = {}
    for kind, call, passes in (("forward", forward, 1.0), ("forward_backward", both, 3.5)):
        call()
        best = sorted(ms_of(call) for _ in range(5))[2]
        tflops = round(passes * problem.flops() / best / 1e9, 2)
        figures[kind] = {"ms": best, "graph_ms": best, "tflops": tflops, "gbps": 0.0}
    return figures


def ms_of(call: Callable[[], object]) -> float:
    """Milliseconds of a call on PyTorch's stream."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    ms: float = begin.elapsed_time(end)
    return ms


def timed(problem: Problem, call: Callable[[], object], passes: float = 1.0) -> dict[str, Any]:
    """Times, and the useful operations and compulsory bytes over the better one."""
    times = measure(call, budget_ms=100.0)
    figure: dict[str, Any] = times._asdict()
    best = times.best
    figure["tflops"] = round(passes * problem.flops() / best / 1e9, 2)
    figure["gbps"] = round(problem.bytes() / best / 1e6, 1)
    return figure


if __name__ == "__main__":
    main()
