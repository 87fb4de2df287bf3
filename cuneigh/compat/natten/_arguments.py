"""Arguments that NATTEN takes and cuneigh does not, made into what cuneigh takes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any


def listed(given: Any) -> Any:
    """A size, or those of all axes in any kind of sequence."""
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given


def steps(given: Any) -> Any:
    """A dilation or stride, where None stands for 1."""
    return 1 if given is None else listed(given)


def flags(given: Any) -> Any:
    """Whether axes are causal, where None stands for False."""
    return False if given is None else listed(given)


def refuse_nested(call: str, arrays: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for a nested tensor."""
    for name, array in arrays.items():
        if getattr(array, "is_nested", False):
            raise NotImplementedError(
                f"natten.{call}: {name} is a nested tensor, which has no counterpart in cuneigh; "
                f"call it for each tensor of {name}.unbind()"
            )


def refuse(call: str, arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for an argument that asks for something that is not there."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"natten.{call}: {name} has no counterpart in cuneigh")


TUNING = frozenset(
    [
        *("backend", "torch_compile", "kernel_schedule", "run_persistent_kernel"),
        *("backward_use_pt_reduction", "backward_kv_splits", "q_tile_size", "kv_tile_size"),
        *("backward_q_tile_size", "backward_kv_tile_size"),
        "op",  # of xformers
    ]
)
"""Arguments that choose and tune NATTEN's own kernels, and say nothing to cuneigh's."""


def only_tuning(call: str, name: str, options: Mapping[str, Any] | None) -> None:
    """Raise NotImplementedError for an option in the dictionary `name` that changes the result."""
    given = options or {}
    refuse(call, {f"{name}[{key!r}]": given[key] for key in given if key not in TUNING})


def integer(call: str, name: str, given: Any) -> int:
    """`given` as an int; TypeError unless it is one."""
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise TypeError(f"natten.{call}: {name}={given!r} is {type(given).__name__}, not an int")
    return operator.index(given)
