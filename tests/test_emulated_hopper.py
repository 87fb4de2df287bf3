"""Hopper's kernels on the host, whose roles wait for each other, while one of them is slow."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from helpers.accuracy import check_backend, run_backend
from helpers.brute_force import visible_mask
from helpers.emulated import H100, ROLES, Emulator, compiler
from helpers.strategies import inputs

from cuneigh._backends import hopper
from cuneigh._backends.hopper import launch
from cuneigh._gpu.passes import BACKWARD, DKV, DQ
from cuneigh._gpu.program import Program
from cuneigh._parameters import Part, window_arguments
from cuneigh._problem import Spec
from cuneigh._validate import attention_problem, dense_problem

pytestmark = pytest.mark.skipif(
    compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)

SMALL = replace(H100, sm_count=2, shared_memory=110 << 10)
"""A block takes several tiles and parts of tiles, and has room for two boxes of keys."""

LONG, SHORT = (72, 32), (64, 40)
"""Dimensions of query and value where dQ has two lines, and where it has one."""


def mixed(shape, rng):
    """Boxes of keys some of which are hidden, all, and none."""
    mask, quarter = rng.random(shape) < 0.9, shape[1] // 4
    mask[:, quarter:] = False
    mask[:, -quarter:] = True
    return mask


def padded(shape, rng):
    mask = np.ones(shape, bool)
    mask[:, shape[1] // 2 :] = False
    return mask


def whole(shape, rng):
    return np.ones(shape, bool)


def problem_of(operation, tokens, kernel_size, dims=(32, 32), dilation=1, has_mask=True):
    query, value = (Spec((1, *tokens, 1, dim), "bfloat16") for dim in dims)
    window = window_arguments("test", len(tokens), kernel_size, 1, dilation, False)
    mask = Spec((1, *tokens), "bool") if has_mask else None
    return attention_problem("test", operation, query, query, value, window, *(None,) * 5, mask)


def with_mask(problem, mask, rng):
    """Random inputs with this mask; what it hides is NaN."""
    given = inputs(replace(problem, has_key_mask=False), rng)
    for tokens in (given.operands.key, given.operands.value):
        tokens[~mask] = np.nan
    mask = mask if problem.has_key_mask else None
    return given._replace(operands=given.operands._replace(key_mask=mask))


def check(emulator, problem, *masks):
    """Compare with the oracle; no bit of the results may depend on who is slow."""
    rng, shape = np.random.default_rng(0), (problem.batch, *problem.key_tokens)
    for mask in masks:
        given, emulator.slow = with_mask(problem, mask(shape, rng), rng), "consumers"
        check_backend(hopper, problem, given, **emulator.native)
    results = {}
    for emulator.slow in ROLES:
        got = run_backend(hopper, problem, given, **emulator.native)
        for name, array in got.items():
            wanted = results.setdefault(name, array)
            np.testing.assert_array_equal(array, wanted, f"{name}, {emulator.slow} slow")


def test_outputs_agree_with_the_oracle_1d(tmp_path):
    problem = problem_of("forward", (500,), 100)
    check(Emulator(tmp_path, SMALL), problem, whole, padded, mixed)


def test_outputs_agree_with_the_oracle_2d(tmp_path):
    problem = problem_of("forward", (16, 20), (7, 9), dilation=2)
    check(Emulator(tmp_path, SMALL), problem, mixed)


def test_outputs_agree_with_the_oracle_3d(tmp_path):
    problem = problem_of("forward", (5, 7, 9), (3, 4, 5), has_mask=False)
    check(Emulator(tmp_path, SMALL), problem, whole)


@pytest.mark.parametrize("dims", [(256, 256), (64, 136)])
def test_outputs_of_long_vectors_agree_with_the_oracle(dims, tmp_path):
    check(Emulator(tmp_path, SMALL), problem_of("forward", (130,), 50, dims), mixed)


@pytest.mark.parametrize(
    ("way", "tokens", "kernel_size", "dims"),
    [
        ((BACKWARD,), (230,), 60, (72, 32)),
        ((BACKWARD,), (13, 21), (6, 9), (72, 32)),
        ((BACKWARD,), (5, 7, 12), (3, 4, 5), (72, 32)),
        ((BACKWARD,), (330,), 130, (64, 40)),
        ((BACKWARD,), (17, 21), (9, 9), (40, 64)),
        ((BACKWARD,), (5, 9, 12), (3, 4, 5), (64, 64)),
        ((DQ, DKV), (390,), 60, (32, 32)),
        ((DQ, DKV), (230,), 90, (136, 136)),
        ((DQ, DKV), (9, 21), (6, 9), (72, 200)),
        ((DQ, DKV), (130,), 50, (256, 256)),
    ],
    ids=[f"sums {kind}{rank}-D" for kind in ("", "of one line ") for rank in (1, 2, 3)]
    + ["dq+dkv", *(f"dq+dkv of long vectors, {lines}" for lines in ("6 lines", "2-D", "8 lines"))],
)
def test_gradients_agree_with_the_oracle(way, tokens, kernel_size, dims, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "passes", lambda *_: way)
    problem = problem_of("backward", tokens, kernel_size, dims)
    check(Emulator(tmp_path, SMALL), problem, padded, mixed)


@pytest.mark.parametrize(("multiprocessors", "dims"), [(1, LONG), (2, LONG), (5, LONG), (2, SHORT)])
def test_no_bit_depends_on_which_block_goes_first(multiprocessors, dims, tmp_path, monkeypatch):
    """With as many blocks as tiles, fewer and more."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    problem = problem_of("backward", (400,), 90, dims, has_mask=False)
    given = with_mask(problem, np.ones((1, 400), bool), np.random.default_rng(0))
    emulator = Emulator(tmp_path, replace(SMALL, sm_count=multiprocessors))
    wanted = run_backend(hopper, problem, given, **emulator.native)
    emulator.in_turns = True
    for emulator.slow in ROLES:
        got = run_backend(hopper, problem, given, **emulator.native)
        for name, array in got.items():
            np.testing.assert_array_equal(array, wanted[name], f"{name}, {emulator.slow} slow")
    check_backend(hopper, problem, given, **emulator.native)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(70, 200), (200, 70)])
def test_gradients_of_cross_attention_agree_with_the_oracle(
    queries, keys, has_mask, tmp_path, monkeypatch
):
    """Logits far below 0 show rows that are no keys: they would have weights without end."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    query, key = (Spec((2, tokens, 2, 72), "float16") for tokens in (queries, keys))
    mask = Spec((2, keys), "bool") if has_mask else None
    problem = dense_problem("test", "backward", query, key, key, False, 0.5, mask)
    rng, emulator = np.random.default_rng(0), Emulator(tmp_path, SMALL)
    given = with_mask(problem, mixed((2, keys), rng) if has_mask else whole((2, keys), rng), rng)
    given.operands.query[:] = abs(given.operands.query)
    given.operands.key[:] = -abs(given.operands.key)
    check_backend(hopper, problem, given, **emulator.native)


@pytest.mark.parametrize(("power", "dims"), [(-100, LONG), (0, LONG), (100, LONG), (100, SHORT)])
def test_sums_of_small_and_large_gradients_agree_with_the_oracle(
    power, dims, tmp_path, monkeypatch
):
    """Of queries that differ in that, too."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    problem = problem_of("backward", (150,), 40, dims, has_mask=False)
    rng = np.random.default_rng(0)
    given = with_mask(problem, np.ones((1, 150), bool), rng)
    of_lse = (2.0**power * rng.standard_normal(problem.lse.shape)).astype("float32")
    given = given._replace(grad_lse=of_lse)
    given.operands.value[:] *= 2.0 ** (power // 2)
    given.grad_output[:] *= 2.0 ** (power // 2)
    given.grad_output[:, ::3] = 0
    check_backend(hopper, problem, given, **Emulator(tmp_path, SMALL).native)


def not_seen(problem, token):
    """Which queries do not see a key, of the only head."""
    return ~visible_mask(problem)[:, np.ravel_multi_index(token, problem.key_tokens)]


@pytest.mark.parametrize(
    ("tokens", "kernel_size", "token", "dims"),
    [
        ((600,), 64, (300,), LONG),
        ((400,), 2, (120,), LONG),
        ((12, 120), (3, 16), (5, 20), LONG),
        ((12, 120), (3, 16), (5, 20), SHORT),
    ],
)
def test_numbers_that_are_not_finite_reach_who_sees_them(
    tokens, kernel_size, token, dims, tmp_path, monkeypatch
):
    """Of other queries dQ may be NaN, but it is right if it is a number."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    problem = problem_of("backward", tokens, kernel_size, dims, has_mask=False)
    emulator, everything = Emulator(tmp_path, SMALL), np.ones((1, *tokens), bool)
    given = with_mask(problem, everything, np.random.default_rng(0))
    wanted = of_query(run_backend(hopper, problem, given, **emulator.native))
    others = not_seen(problem, token)
    for name, number in (("key", np.nan), ("value", np.inf), ("key", -np.inf)):
        given = with_mask(problem, everything, np.random.default_rng(0))
        getattr(given.operands, name)[(0, *token, 0, 3)] = number
        got = of_query(run_backend(hopper, problem, given, **emulator.native))
        assert not np.isfinite(got[~others]).all(-1).any()
        finite = np.isfinite(got) & others[:, None]
        assert finite.any()
        np.testing.assert_allclose(got[finite], wanted[finite], rtol=0, atol=0.01)


def of_query(gradients):
    """dQ [queries, head_dim] of the only head."""
    (array,) = (each for name, each in gradients.items() if name.endswith("query"))
    return array.astype(float).reshape(-1, array.shape[-1])


@pytest.mark.parametrize("dims", [LONG, SHORT])
def test_a_gradient_of_logits_that_overflows_is_not_lost(dims, tmp_path, monkeypatch):
    """In float16, where dS has 16 bits: no finite number stands for it."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    problem = replace(problem_of("backward", (300,), 40, dims, has_mask=False), dtype="float16")
    given = with_mask(problem, np.ones((1, 300), bool), np.random.default_rng(0))
    given.operands.value[0, 230] = 3e4
    given.grad_output[0, 220:240] = 300
    emulator = Emulator(tmp_path, SMALL)
    for emulator.slow in ROLES:
        got = of_query(run_backend(hopper, problem, given, **emulator.native))
        assert not np.isfinite(got[220:240]).all(-1).any(), emulator.slow
        assert np.isfinite(got[:100]).all(), f"those of other boxes, {emulator.slow} slow"


def test_hidden_rows_are_cleared_once_they_have_come(tmp_path, monkeypatch):
    """Tiles of few boxes follow each other, of which some have hidden keys."""
    monkeypatch.setattr(launch, "passes", lambda *_: (BACKWARD,))
    query, mask = Spec((2, 258, 1, 128), "bfloat16"), Spec((2, 258), "bool")
    window = window_arguments("test", 1, 34, 1, 1, False)
    problem = attention_problem("test", "backward", query, query, query, window, *(None,) * 5, mask)
    hidden = np.ones((2, 258), bool)
    hidden[0, :-2] = False
    given = with_mask(problem, hidden, np.random.default_rng(0))
    emulator = Emulator(tmp_path, replace(H100, sm_count=1))
    for emulator.slow in ("TMA", "consumers"):
        check_backend(hopper, problem, given, **emulator.native)


def test_tiles_that_see_nothing_follow_others(tmp_path):
    """Queries far from the keys that are given."""
    query, key = Spec((1, 450, 1, 32), "bfloat16"), Spec((1, 100, 1, 32), "bfloat16")
    window, mask = window_arguments("test", 1, 51, 1, 1, False), Spec((1, 100), "bool")
    emulator = Emulator(tmp_path, SMALL)
    for start in (0, 200):
        part = Part(("cut",), (450,), (0,), (start,))
        problem = attention_problem(
            "test", "forward", query, key, key, window, *(None,) * 4, part, mask
        )
        check(emulator, problem, mixed)


class Stuck(NamedTuple):
    """A kernel that waits for what nobody does."""

    name = "stuck"
    plan = ""
    instance = "stuck"
    unit = """
#include "cuneigh/barrier.cuh"
inline void stuck(unsigned*) {
  auto& barrier = *reinterpret_cast<cuneigh::Barrier*>(emulator::state.smem);
  if (threadIdx.x == 0) barrier.init(2);
  __syncthreads();
  if (threadIdx.x == 0) barrier.arrive();
  if (threadIdx.x >= 32) barrier.wait(0);
}
"""


def test_waits_without_end_are_errors(tmp_path):
    program = Program(SMALL)
    program.launch(Stuck(), (1, 1), 64, [0])
    with pytest.raises(AssertionError, match=r"stuck.*waiting: 32 at .*cpp:9"):
        Emulator(tmp_path).run(program, [])
