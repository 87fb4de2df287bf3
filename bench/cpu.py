"""The CPU backend against PyTorch's ways to do the same on a CPU, and how it scales.

Two layouts, float32, batch 1: 2-D 56 x 56, k = 7, 4 heads, D = 32, and 1-D 4096, k = 129, 4 heads,
D = 64. The peers are FlexAttention, compiled, with the same mask in several block sizes (128 is its
default), and scaled_dot_product_attention with a dense boolean mask. FlexAttention has no backward
on a CPU. Everything is checked against float64 first. A time is the median over many rounds, in
each of which every contender is called twice and the second call is timed; all use the same number
of threads. How busy other processes kept the machine meanwhile is measured and printed.

Then cuneigh against itself: the tiniest windows and heads against their neighbors, half precision
against float32, small windows in three dimensions; the rate of its products against that of one
`numpy.matmul`; the demo's denoising of a photograph of three sizes, and scikit-image's of the
largest. `--only` chooses among these parts, and leaves what `--output` has of the others.

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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import cuneigh
from cuneigh._backends import cpu
from cuneigh._backends.cpu import compiled
from cuneigh._backends.cpu.blas import one_thread
from cuneigh._backends.cpu.compiled import cuts, slabs
from cuneigh._backends.cpu.threads import thread_count
from cuneigh._backends.cpu.tiles import boxes
from cuneigh._device import CPU
from cuneigh._parameters import window_arguments
from cuneigh._problem import Problem, Spec
from cuneigh._validate import attention_problem
from cuneigh.cli import demo

ROOT = Path(__file__).resolve().parent
FLEX_BLOCKS = (16, 32, 64, 128)


class Case(NamedTuple):
    tokens: tuple[int, ...]
    kernel_size: int
    heads: int
    dim: int
    dtype: str = "float32"

    def __str__(self) -> str:
        tokens = "x".join(map(str, self.tokens))
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        k, heads = self.kernel_size, f"{self.heads} x {self.dim}"
        return f"{len(self.tokens)}-D {tokens}, k={k}, {heads}{dtype}"


CASES = (Case((56, 56), 7, 4, 32), Case((4096,), 129, 4, 64))
GROWTH = (
    (Case((56, 56), 7, 4, 32), Case((112, 112), 7, 4, 32), Case((224, 224), 7, 4, 32)),
    (Case((4096,), 129, 4, 64), Case((16384,), 129, 4, 64), Case((65536,), 129, 4, 64)),
)
LARGEST = Case((65536,), 129, 4, 64)
HALVES = tuple(
    tuple(Case(*case[:4], dtype) for dtype in ("float32", "float16", "bfloat16"))
    for case in (*CASES, Case((16, 28, 28), 3, 4, 32))
)
NEIGHBORS = (
    tuple(Case((4096,), k, 4, 64) for k in (1, 2)),
    tuple(Case((56, 56), k, 4, 32) for k in (1, 2)),
    tuple(Case((16, 28, 28), k, 4, 32) for k in (1, 2, 3, 5)),
    tuple(Case((56, 56), 7, 128, dim) for dim in (1, 8)),
)
"""The first of each shall take no longer than the second."""

PRODUCT = 128, 256, 64
SIDES = (512, 1024, 2048)
"""Of the photographs, in pixels."""
PARTS = (
    *("memory", "growth", "comparison", "neighbors", "halves", "rate", "photographs"),
    "scikit-image",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    arguments = parser.parse_args()
    os.environ["CUNEIGH_NUM_THREADS"] = str(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    document: dict[str, Any] = provenance(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in document.items()), flush=True)
    rounds, few = arguments.rounds, max(arguments.rounds // 3, 3)
    # Memory is measured in processes of their own, before PyTorch fills this one.
    measures: dict[str, Callable[[], Any]] = {
        "memory": lambda: elsewhere(memory, LARGEST),
        "growth": lambda: [growth(cases, few) for cases in GROWTH],
        "comparison": lambda: [compare(case, arguments) for case in CASES],
        "neighbors": lambda: [side_by_side(cases, few) for cases in NEIGHBORS],
        "halves": lambda: [side_by_side(cases, rounds, ["forward"]) for cases in HALVES],
        "rate": lambda: rate(CASES[1], rounds),
        "photographs": lambda: [elsewhere(photograph, side) for side in SIDES],
        "scikit-image": lambda: elsewhere(scikit_image, SIDES[-1]),
    }
    for part in arguments.only:
        document[part] = measures[part]()
        PRINT[part](document[part])
    if arguments.output:
        if {*arguments.only} < {*PARTS} and arguments.output.exists():
            document = joined(json.loads(arguments.output.read_text()), document)
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def joined(whole: dict[str, Any], apart: dict[str, Any]) -> dict[str, Any]:
    """A document with the parts of another one, and what that says of itself where they differ."""
    parts = {part: apart[part] for part in PARTS if part in apart}
    about = {
        name: value
        for name, value in apart.items()
        if name in ("commit", "date") or (name not in parts and value != whole.get(name))
    }
    kept = {**whole.get("measured apart", {}), **dict.fromkeys(parts, about)}
    return {**whole, **parts, "measured apart": kept}


def elsewhere(function: Callable[[Any], Any], argument: Any) -> Any:
    """``function(argument)`` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def arrays(case: Case) -> list[np.ndarray]:
    """Query, key, value and a gradient of the output."""
    rng = np.random.default_rng(0)
    shape = (1, *case.tokens, case.heads, case.dim)
    drawn = [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]
    return [array.astype(numpy_dtype(case.dtype)) for array in drawn]


def numpy_dtype(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else name


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
    times = side_by_side(cases, rounds)
    ms = {name: list(each.values()) for name, each in times["ms"].items()}
    return {"cases": " -> ".join(map(str, cases)), "ms": ms, "others": times["others"]}


def side_by_side(
    cases: tuple[Case, ...], rounds: int, names: Sequence[str] = ("forward", "forward and backward")
) -> dict[str, Any]:
    """Times of cases that take turns."""
    result: dict[str, Any] = {"ms": {}}
    for name in names:
        contenders = {str(case): calls(case)[name] for case in cases}
        result["ms"][name], result["others"] = measure(contenders, rounds)
    return result


def rate(case: Case, rounds: int) -> dict[str, Any]:
    """GFLOP/s of all pairs that a forward multiplies, hidden ones too, and of `numpy.matmul`.

    The latter on one core, times the number of threads: it does not divide such small products.
    """
    rows, columns, terms = PRODUCT
    rng = np.random.default_rng(0)
    a = rng.standard_normal((64, rows, terms), dtype=np.float32)
    b = rng.standard_normal((64, terms, columns), dtype=np.float32)
    out = np.empty((64, rows, columns), np.float32)

    def matmul() -> None:
        with one_thread():
            np.matmul(a, b, out=out)

    contenders = {str(case): calls(case)["forward"], "matmul": matmul}
    times, others = measure(contenders, rounds)
    spec = Spec((1, *case.tokens, case.heads, case.dim), case.dtype)
    axes = window_arguments("bench", len(case.tokens), case.kernel_size, 1, 1, False)
    problem = attention_problem("bench", "forward", spec, spec, spec, axes, None)
    flops = {
        str(case): 4 * case.dim * multiplied_pairs(problem),
        "matmul": 2 * out.size * terms * thread_count(),
    }
    rates = {name: round(flops[name] / ms / 1e6, 1) for name, ms in times.items()}
    return {"gflops": rates, "product": PRODUCT, "others": others}


def multiplied_pairs(problem: Problem) -> int:
    """Pairs of a query and a key, hidden ones too, whose products are computed."""
    if compiled.is_faster(problem):
        lanes = slabs.lanes_of(problem)
        return problem.batch * problem.heads * lanes * cuts.logits(problem.axes, lanes)
    return sum(math.prod(box.lead) * box.tile.logits for box in boxes(problem)[0])


def noisy_photograph(side: int) -> np.ndarray:
    """A photograph out of scikit-image again and again, with noise."""
    from skimage.data import chelsea

    small = chelsea().astype(np.float32) / 255
    repeats = (-(-side // small.shape[0]), -(-side // small.shape[1]), 1)
    image: np.ndarray = np.tile(small, repeats)[:side, :side]
    noise = np.random.default_rng(0).normal(scale=0.1, size=image.shape)
    return image + noise.astype(np.float32)


def photograph(side: int) -> dict[str, Any]:
    """Of the demo's denoising: seconds, by the clock and of the processor, and the workspace."""
    demo.denoise(demo.tensors_of(noisy_photograph(64), 5, np), 13, 0.1, "cpu")  # compiles
    image = noisy_photograph(side)
    tensors = demo.tensors_of(image, 5, np)
    tracemalloc.start()
    output = demo.denoise(tensors, 13, 0.1, "cpu")
    beyond = tracemalloc.get_traced_memory()[1] - output.nbytes
    tracemalloc.stop()
    del tensors, output
    rounds = []
    for _ in range(3):
        begin, busy = time.perf_counter(), time.process_time()
        tensors = demo.tensors_of(image, 5, np)
        made, busy_made = time.perf_counter(), time.process_time()
        demo.denoise(tensors, 13, 0.1, "cpu")
        done, busy_done = time.perf_counter(), time.process_time()
        rounds.append((made - begin, done - made, busy_made - busy, busy_done - busy_made))
        del tensors
    least = [round(min(each), 3) for each in zip(*rounds, strict=True)]
    return {
        "side": side,
        "s": {"query and key": least[0], "na2d": least[1]},
        "processor s": {"query and key": least[2], "na2d": least[3]},
        "MiB beyond the result": round(beyond / 2**20, 1),
        "bytes a pixel": round(beyond / side**2, 1),
    }


def scikit_image(side: int) -> dict[str, float]:
    """Seconds of both modes of scikit-image's denoising, on one core."""
    theirs = demo.seconds_of_scikit_image(noisy_photograph(side), 13, 5, 0.1)
    return {"side": side, **{mode: round(taken, 2) for mode, taken in theirs.items()}}


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


def print_comparison(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        print(f"\n{entry['case']} (others used {entry['others']:.0%} of the time computed)")
        for kind in ("forward", "forward_and_backward"):
            times = entry[f"{kind}_ms"]
            for name, ms in times.items():
                print(f"  {kind:22}{name:30}{ms:9.2f} ms{ms / times['cuneigh']:8.2f}x")
        print(flush=True)


def print_growth(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        for name, times in entry["ms"].items():
            steps = ", ".join(f"{b / a:.2f}" for a, b in itertools.pairwise(times))
            print(f"{entry['cases']}, {name}: {times} ms, growing by {steps} from N to 4N")


def print_side_by_side(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        for name, times in entry["ms"].items():
            first = next(iter(times.values()))
            for case, ms in times.items():
                print(f"{name:22}{case:46}{ms:9.2f} ms{ms / first:8.2f}x", flush=True)


def print_rate(result: dict[str, Any]) -> None:
    ours, matmul = result["gflops"].values()
    print(f"{result['gflops']} GFLOP/s, {ours / matmul:.0%} of the rate of {PRODUCT}")


def print_photographs(results: list[dict[str, Any]]) -> None:
    for result in results:
        pixels = result["side"] ** 2
        of_pixel = {name: round(1e6 * s / pixels, 2) for name, s in result["processor s"].items()}
        print(f"{result}; us a pixel of the processor: {of_pixel}", flush=True)


def print_memory(result: dict[str, Any]) -> None:
    for name, extra in result.items():
        print(f"{LARGEST}, {name}: {extra} MiB beyond the results")


PRINT: dict[str, Callable[[Any], None]] = {
    "memory": print_memory,
    "growth": print_growth,
    "comparison": print_comparison,
    "neighbors": print_side_by_side,
    "halves": print_side_by_side,
    "rate": print_rate,
    "photographs": print_photographs,
    "scikit-image": print,
}


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
    return {**about, "numpy": np.__version__, "compiled": cpu.about()}


if __name__ == "__main__":
    main()
