"""Stages of the kernels for small windows that TMA brings: where, and which arrays it can read."""

from __future__ import annotations

import itertools
import math
import platform
from dataclasses import replace

import pytest
from helpers.emulated import H100, Emulator, compiler
from hypothesis import given
from hypothesis import strategies as st

from cuneigh._backends import fused
from cuneigh._backends.fused import launch
from cuneigh._backends.fused.passes import passes
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._backends.fused.small import tma
from cuneigh._gpu.passes import FORWARD
from cuneigh._gpu.program import Program
from cuneigh._gpu.tensor_map import TensorMap
from cuneigh._parameters import window_arguments
from cuneigh._problem import Operands, Spec
from cuneigh._validate import attention_problem


def problem_of(tokens, kernel_size, dim, heads=2, dilation=1, has_mask=False):
    query = Spec((2, *tokens, heads, dim), "bfloat16")
    mask = Spec((2, *tokens), "bool") if has_mask else None
    window = window_arguments("test", len(tokens), kernel_size, 1, dilation, False)
    return attention_problem("test", "forward", query, query, query, window, *(None,) * 5, mask)


def plan_by_tma(problem, pass_):
    """The cheapest plan with TMA."""
    plans = [
        plan
        for plan in small_plan.candidates(problem, H100, pass_)
        if plan.by_tma and small_plan.resident(problem, plan, H100, pass_)
    ]
    return min(plans, key=lambda plan: small_plan.cost(problem, plan, H100, pass_))


@given(st.lists(st.tuples(st.integers(1, 15), st.integers(0, 15)), min_size=1, max_size=3))
def test_phases_of_a_padded_stage_are_those_of_the_tile(axes):
    tile, stage = zip(*((extent, extent + more) for extent, more in axes), strict=True)
    padded = tma.padded_stage(tile, stage)
    assert padded[0] == stage[0]
    assert all(0 <= p - s < tma.PHASES for p, s in zip(padded, stage, strict=True))
    for slot, x in enumerate(itertools.product(*map(range, tile))):
        column = sum(x[axis] * math.prod(padded[axis + 1 :]) for axis in range(len(x)))
        assert (column - slot) % tma.PHASES == 0


def test_tma_brings_stages_where_it_was_measured():
    problem = problem_of((56, 56), 7, 32)
    for of, pass_ in itertools.product(
        (problem, replace(problem, has_key_mask=True)), passes(problem) + passes(problem.gradient)
    ):
        plan = small_plan.make_plan(of, H100, pass_)
        assert plan is not None
        assert plan.by_tma
    others = [
        replace(problem, head_dim=64),
        replace(problem, head_dim=128, value_dim=128),
    ]
    assert not any(tma.takes(other, (9, 0), FORWARD) for other in others)
    assert not any(tma.takes(problem, each, FORWARD) for each in ((8, 0), (10, 0), (12, 0)))


@pytest.mark.parametrize("tokens", [(56, 56), (9, 16, 16)])
def test_what_tma_cannot_read_is_copied(tokens, monkeypatch):
    problem = problem_of(tokens, 3, 64)
    plan = plan_by_tma(problem, FORWARD)
    monkeypatch.setattr(launch, "choose_plan", lambda *_: plan)
    shape = problem.specs.query.shape

    def maps(strides):
        program = Program(H100)
        arrays = [program.array(problem.specs.query, each) for each in (None, strides, None, None)]
        fused.forward(problem, Operands(*arrays[:3]), arrays[3], None, program)
        (recorded,) = program._recorded
        return [each for each in recorded.parameters if isinstance(each, TensorMap)]

    assert len(maps(None)) == 2
    contiguous = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    assert maps((0, *contiguous[1:])) == []  # one element of the batch, broadcast
    heads_apart = [*(2 * stride for stride in contiguous[:-1]), 1]
    assert len(maps(tuple(heads_apart))) == (0 if len(tokens) == 3 else 2)


@pytest.mark.skipif(
    compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)
@pytest.mark.parametrize(
    ("operation", "tokens", "dilation", "has_mask"),
    [
        ("forward", (23, 9), (2, 1), False),
        ("backward", (60,), 1, False),
        ("forward", (23, 9), (2, 1), True),
        ("backward", (60,), 1, True),
    ],
    ids=["forward", "backward", "masked-forward", "masked-backward"],
)
def test_boxes_agree_with_the_oracle(operation, tokens, dilation, has_mask, tmp_path, monkeypatch):
    def choose_plan(problem, device, pass_=FORWARD, *_):
        return plan_by_tma(problem, pass_)

    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    problem = problem_of(tokens, 5, 32, dilation=dilation, has_mask=has_mask).but(operation)
    Emulator(tmp_path).check(fused, problem, seed=0)
