"""The CPU backend against PyTorch's ways to do the same on a CPU, and how it scales.

Two layouts, float32, batch 1: 2-D 56 x 56, k = 7, 4 heads, D = 32, and 1-D 4096, k = 129, 4 heads,
D = 64. The peers are FlexAttention, compiled, with the same mask in several block sizes (128 is its
default), and scaled_dot_product_attention with a dense boolean mask. FlexAttention has no backward
on a CPU. Everything is checked against float64 first. A time is the median over many rounds, in
each of which every contender is called twice and the second call is timed; all use the same number
of threads. How busy other processes kept the machine meanwhile is measured and printed.

    python bench/cpu.py --output bench/results/cpu.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cuneigh
from cuneigh._device import CPU

ROOT = Path(__file__).resolve().parent
FLEX_BLOCKS = (16, 32, 64, 128)


class Case(NamedTuple):
    tokens: tuple[int, ...]
    kernel_size: int
    heads: int
    dim: int

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens))
        return f"{len(self.tokens)}-D {tokens}, k={self.kernel_size}, {self.heads} x {self.dim}"


CASES = (Case((56, 56), 7, 4, 32), Case((4096,), 129, 4, 64))
GROWTH = (
    (Case((56, 56), 7, 4, 32), Case((112, 112), 7, 4, 32), Case((224, 224), 7, 4, 32)),
    (Case((4096,), 129, 4, 64), Case((16384,), 129, 4, 64), Case((65536,), 129, 4, 64)),
)
LARGEST = Case((65536,), 129, 4, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    os.environ["CUNEIGH_NUM_THREADS"] = str(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    document: dict[str, Any] = provenance(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in document.items()), flush=True)
    # Memory is measured in a process of its own, before PyTorch fills this one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        document["memory"] = pool.submit(memory, LARGEST).result()
    document["growth"] = [growth(cases, max(arguments.rounds // 3, 3)) for cases in GROWTH]
    document["comparison"] = [compare(case, arguments) for case in CASES]
    for entry in document["comparison"]:
        print_comparison(entry)
    for entry in document["growth"]:
        for name, times in entry["ms"].items():
            steps = ", ".join(f"{b / a:.2f}" for a, b in itertools.pairwise(times))
            print(f"{entry['cases']}, {name}: {times} ms, growing by {steps} from N to 4N")
    for name, extra in document["memory"].items():
        print(f"{LARGEST}, {name}: {extra} MiB beyond the results")
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def arrays(case: Case) -> list[np.ndarray]:
    """Query, key, value and a gradient of the output."""
    rng = np.random.default_rng(0)
    shape = (1, *case.tokens, case.heads, case.dim)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def calls(case: Case) -> dict[str, Callable[[], list[np.ndarray]]]:
    """cuneigh's forward, and its forward and backward."""
    query, key, value, grad_output = arrays(case)
    rank, k = len(case.tokens), case.kernel_size
    function = getattr(cuneigh, f"na{rank}d")
    function_backward = getattr(cuneigh, f"na{rank}d_backward")

    def forward() -> list[np.ndarray]:
        return [function(query, key, value, k)]

    def both() -> list[np.ndarray]:
        output, lse = function(query, key, value, k, return_lse=True)
        gradients = function_backward(grad_output, query, key, value, output, lse, k)
        return [output, gradients.query, gradients.key, gradients.value]

    return {"forward": forward, "forward and backward": both}


# Times


def measure(
    contenders: dict[str, Callable[[], object]], rounds: int
) -> tuple[dict[str, float], float]:
    """Median ms of each, and the share of the machine that others used in the meantime."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    others = []
    for _ in range(rounds):
        before = cpu_seconds()
        for name, call in contenders.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        total, own = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
        others.append(max(total - own, 0.0) / max(total, 1e-9) if total else 0.0)
    medians = {name: round(1e3 * statistics.median(each), 2) for name, each in times.items()}
    return medians, round(statistics.median(others), 3)


def cpu_seconds() -> tuple[float, float]:
    """Time that all processes have spent computing, and that this one has."""
    own = time.process_time()
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return own, own
    user, nice, system = map(int, fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), own


def growth(cases: tuple[Case, ...], rounds: int) -> dict[str, Any]:
    """Times of one problem at N, 4N and 16N."""
    result: dict[str, Any] = {"cases": " -> ".join(map(str, cases)), "ms": {}}
    for name in ("forward", "forward and backward"):
        contenders = {str(case): calls(case)[name] for case in cases}
        times, result["others"] = measure(contenders, rounds)
        result["ms"][name] = list(times.values())
    return result


# The comparison


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    torch.set_num_threads(arguments.threads)
    ours = calls(case)
    tensors = [torch.from_numpy(head_major(array).copy()) for array in arrays(case)]
    query, key, value, grad_output = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    mask = mask_function(case)
    tokens = torch.arange(math.prod(case.tokens))
    dense = mask(None, None, tokens[:, None], tokens[None, :])

    def sdpa() -> list[Any]:
        return [scaled_dot_product_attention(query, key, value, attn_mask=dense)]

    def sdpa_both() -> list[Any]:
        for leaf in leaves:
            leaf.grad = None
        output = scaled_dot_product_attention(*leaves, attn_mask=dense)
        output.backward(grad_output)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    expected = dense_float64(tensors, dense)
    for name, call in ours.items():
        check(f"cuneigh {name}", [head_major(array) for array in call()], expected)
    check("SDPA", sdpa_both(), expected)

    forward = {"cuneigh": ours["forward"], "SDPA, dense mask": sdpa}
    for block in FLEX_BLOCKS:
        forward[f"FlexAttention, blocks of {block}"] = flex = compiled_flex(
            case, (query, key, value), mask, block
        )
        check(f"FlexAttention {block}", flex(), expected)
    both = {"cuneigh": ours["forward and backward"], "SDPA, dense mask": sdpa_both}
    result: dict[str, Any] = {"case": str(case), "torch": torch.__version__}
    result["forward_ms"], result["others"] = measure(forward, arguments.rounds)
    result["forward_and_backward_ms"], _ = measure(both, max(arguments.rounds // 2, 3))
    return result


def head_major(array: np.ndarray) -> np.ndarray:
    """[1, heads, tokens, dim]"""
    return np.moveaxis(array.reshape(1, -1, *array.shape[-2:]), 2, 1)


def mask_function(case: Case) -> Callable[..., Any]:
    """Whether a query sees a key, both counted in C order, for FlexAttention's `mask_mod`."""
    import torch

    k = case.kernel_size

    def window(query: Any, key: Any, length: int) -> Any:
        offset = key - torch.clamp(query - k // 2, 0, length - k)
        return (offset >= 0) & (offset < k)

    def visible_1d(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return window(query, key, case.tokens[0])

    def visible_2d(batch: Any, head: Any, query: Any, key: Any) -> Any:
        rows, columns = case.tokens
        return window(query // columns, key // columns, rows) & window(
            query % columns, key % columns, columns
        )

    return visible_1d if len(case.tokens) == 1 else visible_2d


def compiled_flex(
    case: Case, tensors: tuple[Any, ...], mask: Callable[..., Any], block: int
) -> Callable[[], list[Any]]:
    """FlexAttention as one compiled C++ kernel; an error if it was anything else."""
    import torch
    from torch._dynamo.utils import counters
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = math.prod(case.tokens)
    block_mask = create_block_mask(mask, None, None, tokens, tokens, "cpu", BLOCK_SIZE=block)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(flex_attention, fullgraph=True)

    def call() -> list[Any]:
        return [compiled(*tensors, block_mask=block_mask)]

    call()
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 1, counters["inductor"]
    assert not counters["graph_break"], counters["graph_break"]
    return call


def dense_float64(tensors: list[Any], dense: Any) -> list[np.ndarray]:
    """The output and the gradients of query, key and value, one head at a time."""
    import torch

    results = []
    for head in range(tensors[0].shape[1]):
        *inputs, grad_output = (tensor[0, head].double() for tensor in tensors)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        query, key, value = leaves
        logits = (query @ key.T * query.shape[-1] ** -0.5).masked_fill(~dense, -torch.inf)
        output = logits.softmax(-1) @ value
        output.backward(grad_output)
        results.append([output.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)])
    return [np.stack(heads)[None] for heads in zip(*results, strict=True)]


def check(name: str, got: list[Any], expected: list[np.ndarray]) -> None:
    """Raise unless the error is at the level of float32 rounding."""
    for result, oracle in zip(got, expected, strict=False):
        error = np.abs(np.asarray(result) - oracle).max() / np.abs(oracle).max()
        if not error < 100 * np.finfo(np.float32).eps:
            raise AssertionError(f"{name} errs {error:.3g} of the largest element")


def print_comparison(entry: dict[str, Any]) -> None:
    print(f"\n{entry['case']} (others used {entry['others']:.0%} of the time computed)")
    for kind in ("forward", "forward_and_backward"):
        times = entry[f"{kind}_ms"]
        for name, ms in times.items():
            print(f"  {kind:22}{name:30}{ms:9.2f} ms{ms / times['cuneigh']:8.2f}x")
    print(flush=True)


# Memory


def memory(case: Case) -> dict[str, dict[str, float]]:
    """MiB beyond inputs and results: NumPy's own peak, and that of the resident memory."""
    results = {}
    for name, call in calls(case).items():
        given = 3 if name == "forward" else 4
        held = sum(array.nbytes for array in call())  # warm: tables and threads exist
        lse = held // (given * case.dim) if name != "forward" else 0
        tracemalloc.start()
        call()
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        results[name] = {"allocated": round((traced - held - lse) / 2**20, 1)}
        resident = resident_growth(call)
        if resident is not None:
            results[name]["resident"] = round((resident - held - lse) / 2**20, 1)
    return results


def resident_growth(call: Callable[[], object]) -> float | None:
    """By how many bytes the resident memory of this process peaks during `call`; on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


# Where the figures come from


def provenance(threads: int) -> dict[str, Any]:
    from cuneigh._measure import provenance

    about = {**provenance.provenance(CPU), "threads": threads, "python": platform.python_version()}
    return {**about, "numpy": np.__version__}


if __name__ == "__main__":
    main()
