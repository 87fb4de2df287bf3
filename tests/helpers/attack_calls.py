"""Calls of the public functions on a GPU or the CPU, as `attack` makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from helpers import gpu_arrays
from helpers.calls import results_of
from helpers.dense import Dense
from helpers.illegal import call_of

import cuneigh
from cuneigh import _device, _jit
from cuneigh._backends import BACKENDS
from cuneigh._problem import Problem, Spec


def xp_of(device: str) -> Any:
    if device == "cpu":
        return np
    import cupy

    return cupy


def native(array: np.ndarray, device: str) -> Any:
    return array if device == "cpu" else gpu_arrays.to_cupy(array)


def backends(problem: Problem, device: str) -> list[str]:
    where = _device.CPU if device == "cpu" else _device.cuda(0)
    return [each.NAME for each in BACKENDS if each.unsupported(problem, where) is None]


def call(problem: Problem, arrays: dict[str, Any], backend: str) -> dict[str, Any]:
    """The results of the public function, by name; RuntimeError if these strides are refused."""
    made = call_of(problem)
    arguments = {
        name: arrays.get(name) if isinstance(value, Spec) else value
        for name, value in made.arguments.items()
    }
    if problem.operation == "forward":
        arguments["return_lse"] = True
    return results_of(problem, getattr(cuneigh, made.function)(**arguments, backend=backend))


def with_forward(problem: Problem, arrays: dict[str, Any], device: str, xp: Any) -> dict[str, Any]:
    """For a backward: the output and lse of the oracle, in the precision of the problem."""
    if problem.operation != "backward":
        return arrays
    forward = replace(problem, operation="forward")
    results = Dense(forward, arrays, xp).run()
    output, lse = results["output"].expected, results["lse"].expected
    dtype = arrays["query"].dtype
    accumulator = xp.float64 if problem.accumulator == "float64" else xp.float32
    return arrays | {"output": output.astype(dtype), "lse": lse.astype(accumulator)}


def architecture() -> str:
    """The one that this GPU's kernels are compiled for."""
    own, _ = _jit._load.architectures_of(_device.cuda(0))
    return own[0]
