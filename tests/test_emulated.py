"""Kernels on the host, whose threads are fibers: parts and masks without a GPU."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
from helpers.emulated import H100, Emulator, compiler
from helpers.part_problems import Family, part_problem
from helpers.strategies import inputs

from cuneigh._backends import fused, naive
from cuneigh._backends.fused import launch
from cuneigh._backends.fused import plan as fused_plan
from cuneigh._backends.fused.small import plan as small_plan
from cuneigh._gpu.passes import FORWARD, JVP
from cuneigh._parameters import window_arguments
from cuneigh._problem import Spec
from cuneigh._validate import attention_problem

pytestmark = pytest.mark.skipif(
    compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)


@pytest.mark.parametrize(
    ("backend", "family"),
    [(naive, Family("float64", 2, 4, 3)), (fused, Family("float32", 1, 16, 16))],
    ids=["naive", "fused"],
)
def test_parts_and_masks_agree_with_the_oracle(backend, family, tmp_path):
    emulator = Emulator(tmp_path)
    for seed in range(4):
        problem = part_problem(np.random.default_rng(seed), family, "forward", has_mask=True)
        emulator.check(backend, problem, seed)


def test_tangents_of_small_windows_agree_with_the_oracle(tmp_path, monkeypatch):
    """With a mask, whose hidden keys and values have tangents that must not count either."""

    def choose_plan(problem, device, pass_, small_windows=True, *_):
        plan = small_plan.make_plan(problem, device, pass_)
        assert plan is not None
        return plan

    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    emulator, checked = Emulator(tmp_path), 0
    for seed in range(24):
        family = Family("float16", 2, 32, 32)
        problem = part_problem(np.random.default_rng(seed), family, "jvp", has_mask=True)
        problem = replace(problem, scale=abs(problem.scale) or 1.0)
        plan = small_plan.make_plan(problem, H100, JVP)
        if plan is not None and plan.columns == 48:  # one kernel for all of them
            emulator.check(fused, problem, seed)
            checked += 1
    assert checked > 1


def test_second_order_of_small_windows_agrees_with_the_oracle(tmp_path, monkeypatch):
    """With a mask, and queries in several stages."""
    window = window_arguments("test", 1, 33, 1, 1, False)
    query, key = (Spec((2, 70, heads, 32), "float16") for heads in (2, 1))
    mask = Spec((2, 70), "bool")
    problem = attention_problem("test", "hvp", query, key, key, window, *(None,) * 5, mask)

    def choose_plan(problem, device, pass_, *_):
        if pass_ == JVP:
            return fused_plan.make_plan(problem, device, pass_)
        plans = small_plan.plans_to_try(problem, device, pass_, 1000)
        return next(plan for plan in plans if plan.one_stage != pass_.rows_are_keys)

    monkeypatch.setattr(launch, "choose_plan", choose_plan)
    Emulator(tmp_path).check(fused, problem, 0)


def test_a_block_of_small_windows_looks_at_masks_ahead(tmp_path, monkeypatch):
    """For some elements of the batch at once, of which there are more here; for all heads once."""

    def whole(problem, plan, device, pass_, rates):
        return replace(plan, batch_heads=small_plan.sizes(problem, pass_)[0])

    def small(problem, device, pass_=FORWARD, *_):
        return small_plan.make_plan.__wrapped__(problem, device, pass_)

    monkeypatch.setattr(small_plan, "with_batch_heads", whole)
    monkeypatch.setattr(launch, "choose_plan", small)
    emulator = Emulator(tmp_path)
    window = window_arguments("test", 1, 15, 1, 1, False)
    for batch, heads in ((11, 1), (1, 3)):
        query, mask = Spec((batch, 40, heads, 32), "float16"), Spec((batch, 40), "bool")
        problem = attention_problem(
            "test", "forward", query, query, query, window, *(None,) * 5, mask
        )
        for seed in range(4):
            emulator.check(fused, problem, seed)


def test_outputs_in_parts_are_zero_where_every_key_is_hidden(tmp_path, monkeypatch):
    """Of 128 dimensions, which small windows compute and write 64 at a time."""

    def small(problem, device, pass_=FORWARD, *_):
        plan = small_plan.make_plan(problem, device, pass_)
        assert plan is not None
        assert plan.one_stage
        return plan

    monkeypatch.setattr(launch, "choose_plan", small)
    query, value = Spec((2, 9, 1, 32), "float16"), Spec((2, 9, 1, 128), "float16")
    mask = Spec((2, 9), "bool")
    window = window_arguments("test", 1, 3, 1, 1, False)
    problem = attention_problem("test", "forward", query, query, value, window, *(None,) * 5, mask)
    seeds = [seed for seed in range(40) if not mask_of(problem, seed)[0].any()]
    emulator = Emulator(tmp_path)
    for seed in seeds[:2]:
        emulator.check(fused, problem, seed)


def mask_of(problem, seed):
    return inputs(problem, np.random.default_rng(seed)).operands.key_mask
