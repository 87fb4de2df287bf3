"""What every backend takes, as it answers when it is asked: the support matrix of README.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cuneigh._backends import BACKENDS, Backend
from cuneigh._device import CPU, SHARED_MEMORY, Device
from cuneigh._measure.cases import problem_of
from cuneigh._problem import DTYPES, Problem
from cuneigh._window import Axis
from cuneigh.cli.devices import device_of


def matrix() -> str:
    """What each backend takes, by its own answers."""
    rows = {"": [f"`{backend.NAME}`" for backend in BACKENDS]}
    rows["---"] = ["---"] * len(BACKENDS)
    for title, cell in ROWS.items():
        rows[title] = [cell(backend) for backend in BACKENDS]
    return "".join(f"| {title} | {' | '.join(cells)} |\n" for title, cells in rows.items())


BASE = problem_of({"tokens": [16, 16], "heads": 4, "dim": 64, "kernel": 3}, "float16")
LENGTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 1024)
"""Of head vectors that are asked about."""


def takes(backend: Backend, problem: Problem, device: Device | None = None) -> bool:
    """Whether a backend runs a problem, on the newest GPU that all GPU backends run on."""
    device = device or (CPU if backend.unsupported(BASE, CPU) is None else device_of("sm_90"))
    return backend.unsupported(problem, device) is None


def in_both(backend: Backend, problem: Problem) -> str:
    """yes, no or forward, for a problem and its gradient."""
    forward, backward = (takes(backend, each) for each in (problem, problem.gradient))
    return "yes" if forward and backward else "forward" if forward else "no"


def sm(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


def machines(backend: Backend) -> str:
    if takes(backend, BASE, CPU):
        return "any CPU"
    able = [arch for arch in SHARED_MEMORY if takes(backend, BASE, device_of(sm(arch)))]
    names = [".".join(map(str, arch)) for arch in able]
    later = able[-1] == max(SHARED_MEMORY) and len(able) > 1
    return f"{names[0]} and later" if later else ", ".join(names)


def dtypes(backend: Backend) -> str:
    able = [name for name in DTYPES if takes(backend, replace(BASE, dtype=name))]
    return "all" if len(able) == len(DTYPES) else ", ".join(f"`{name}`" for name in able)


def head_dims(backend: Backend) -> str:
    """The longest, and the step; of a backward, too, where that is another."""
    found = []
    for problem in (BASE, BASE.gradient):

        def of(dim: int, problem: Problem = problem) -> bool:
            return takes(backend, replace(problem, head_dim=dim, value_dim=dim))

        longest = max(filter(of, LENGTHS))
        step = next(step for step in (1, 2, 4, 8) if of(32 + step))
        limit = "any" if longest == max(LENGTHS) else f"to {longest}"
        found.append(limit if step == 1 else f"{limit} by {step}")
    return found[0] if found[0] == found[1] else f"{found[0]}; backward {found[1]}"


def dilations(backend: Backend) -> str:
    axis = Axis(512, 512, 3, 1, 1, False)
    able = [
        d for d in range(1, 33) if takes(backend, replace(BASE, axes=(replace(axis, dilation=d),)))
    ]
    return "any" if able[-1] == 32 else f"to {able[-1]}"


def unfused(backend: Backend) -> str:
    return "yes" if takes(backend, replace(BASE, operation="qk", value_dim=1)) else "no"


def beyond_whole_layouts(backend: Backend) -> str:
    """yes, no, or which of parts, borders and masks a backend takes, forward and backward."""
    whole = Axis(16, 16, 3, 1, 1, False)
    kinds = {
        "parts": replace(BASE, axes=(replace(whole, layout=32),) * 2),
        "`cut`": replace(BASE, axes=(replace(whole, border="cut"),) * 2),
        "`wrap`": replace(BASE, axes=(replace(whole, border="wrap"),) * 2),
        "`key_mask`": replace(BASE, has_key_mask=True),
    }
    able = [name for name, problem in kinds.items() if in_both(backend, problem) == "yes"]
    return "yes" if len(able) == len(kinds) else ", ".join(able) or "no"


ROWS: dict[str, Callable[[Backend], str]] = {
    "compute capability": machines,
    "dtypes": dtypes,
    "head dims": head_dims,
    "dilation": dilations,
    "causal, strides, grouped heads, additional keys": lambda backend: in_both(
        backend,
        replace(BASE, kv_heads=2, additional=2, axes=(Axis(16, 16, 4, 2, 1, True),) * 2),
    ),
    "parts of a layout, borders, key masks": beyond_whole_layouts,
    "relative positional bias (`rpb`)": lambda backend: in_both(
        backend, replace(BASE, rpb_dtype="float32")
    ),
    "cross attention": lambda backend: in_both(
        backend, replace(BASE, axes=(Axis(16, 24, 24, 1, 1, False),))
    ),
    "unfused operations (`qk`, `av`)": unfused,
}
