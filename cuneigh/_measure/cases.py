"""Problems to measure: one from options, many from a JSON file like `bench/cases.json`.

A file holds a list of objects. `name`, `tokens`, `heads`, `dim` and `kernel` are needed; `batch` is
1 unless given, and so are `stride` and `dilation` along every axis, which an int repeats; `causal`
is false. `kv_heads`, `value_dim`, `additional_keys` and `dtype` may be given, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cuneigh._parameters import window_arguments
from cuneigh._problem import Problem, Spec
from cuneigh._validate import attention_problem

NEEDED = ("tokens", "heads", "dim", "kernel")
OPTIONAL: Mapping[str, Any] = {
    "batch": 1,
    "stride": 1,
    "dilation": 1,
    "causal": False,
    "kv_heads": None,
    "value_dim": None,
    "additional_keys": None,
    "dtype": None,
}


class Case(NamedTuple):
    """A problem of the forward, with a name."""

    name: str
    problem: Problem


def problem_of(case: Mapping[str, Any], dtype: str, call: str = "profile") -> Problem:
    """The problem of an entry of such a file; what is illegal is an error of `call`."""
    given = {**OPTIONAL, **case}
    dtype = given["dtype"] or dtype
    tokens, heads, dim = tuple(given["tokens"]), given["heads"], given["dim"]
    if not 1 <= len(tokens) <= 3:
        raise ValueError(f"{call}: there are {len(tokens)} token axes, but 1 to 3 are possible")
    kv_heads, value_dim = given["kv_heads"] or heads, given["value_dim"] or dim
    window = window_arguments(
        call, len(tokens), given["kernel"], given["stride"], given["dilation"], given["causal"]
    )
    extra = given["additional_keys"]

    def spec(tokens: tuple[int, ...], heads: int, dim: int) -> Spec:
        return Spec((given["batch"], *tokens, heads, dim), dtype)

    return attention_problem(
        call,
        "forward",
        spec(tokens, heads, dim),
        spec(tokens, kv_heads, dim),
        spec(tokens, kv_heads, value_dim),
        window,
        None,
        *(spec((extra,), kv_heads, each) if extra else None for each in (dim, value_dim)),
    )


def read(path: Path, dtype: str, call: str = "profile") -> list[Case]:
    """The cases of a file, in its order; ValueError for what is no case, OSError for no file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{call}: {path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError(f"{call}: {path} does not hold a list of objects")
    cases = []
    for number, entry in enumerate(entries):
        name = str(entry.get("name", number))
        values = {key: value for key, value in entry.items() if key != "name"}
        missing = [key for key in NEEDED if key not in values]
        unknown = [key for key in values if key not in (*NEEDED, *OPTIONAL)]
        if missing or unknown:
            what = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
            raise ValueError(f"{call}: case {name!r} of {path} {what}")
        cases.append(Case(name, problem_of(values, dtype, f"{call}, case {name}")))
    return cases
