"""Borders, parts of a layout and key masks, by the public functions on NumPy arrays.

What backends make of every kind of problem is tested against the oracle elsewhere. Here parts are
compared with the whole, rings and masks with what users made of them so far, and windows with the
functions of other libraries.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from helpers import brute_force
from helpers.calls import arguments_of
from helpers.strategies import generators, inputs, problems
from hypothesis import given, settings
from hypothesis import strategies as st

import cuneigh
from cuneigh._problem import Problem

SMALL = {"dtypes": ("float64",), "most_tokens": 40, "budget": 4_000, "cross": False}
QUERIES = ("query", "output", "lse", "grad_output", "grad_lse")
KEYS = ("key", "value", "key_mask")
ADDITIONAL = ("additional_keys", "additional_values")


def close(a: Any, b: Any) -> None:
    error = 1e-5 if a.dtype == np.float32 else 1e-9
    np.testing.assert_allclose(a, b, rtol=error, atol=error)


# Any cut


def pieces(draw, lengths: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """A cut of a box of tokens into boxes."""
    along = []
    for length in lengths:
        cuts = draw(st.lists(st.integers(1, max(length - 1, 1)), max_size=1, unique=True))
        edges = [0, *sorted(cut for cut in cuts if cut < length), length]
        along.append([slice(*pair) for pair in itertools.pairwise(edges)])
    return list(itertools.product(*along))


def cut(arguments: dict[str, Any], problem: Problem, queries: Any, keys: Any) -> dict[str, Any]:
    """The arguments of a part, given those of the whole."""

    def begins(name: str, piece: Any) -> tuple[int, ...]:
        starts = [getattr(axis, name) for axis in problem.axes]
        return tuple(start + each.start for start, each in zip(starts, piece, strict=True))

    part = {
        name: array[:, *(queries if name in QUERIES else keys)]
        if name in (*QUERIES, *KEYS) and array is not None
        else array
        for name, array in arguments.items()
    }
    return part | {
        "border": tuple(axis.border for axis in problem.axes),
        "layout": tuple(axis.layout for axis in problem.axes),
        "query_start": begins("query_start", queries),
        "key_start": begins("key_start", keys),
    }


@settings(max_examples=max(settings.default.max_examples // 2, 1))
@given(
    st.data(),
    problems(operations=("backward",), ranks=(1, 2), ordinary=False, **SMALL),
    generators(),
)
def test_any_cut_merged_is_the_whole_forward_and_backward(data, problem, rng):
    function, backward = arguments_of(problem, inputs(problem, rng))
    attend = getattr(cuneigh, function.removesuffix("_backward"))
    forward = {n: a for n, a in backward.items() if n not in (*QUERIES[1:],)}
    forward["return_lse"] = True
    output, lse = attend(**forward)
    backward |= {"output": output, "lse": lse}
    whole = getattr(cuneigh, function)(**backward)
    sums = {n: np.zeros_like(a) for n, a in whole._asdict().items() if a is not None}

    cut_of_keys = pieces(data.draw, problem.key_tokens)
    for queries in pieces(data.draw, problem.tokens):
        parts = []
        for number, keys in enumerate(cut_of_keys):
            # Additional keys are given to one part of the keys.
            left_out = dict.fromkeys(ADDITIONAL if number else ())
            parts.append(attend(**cut(forward, problem, queries, keys) | left_out))
            of_part = cut(backward, problem, queries, keys) | left_out
            gradients = getattr(cuneigh, function)(**of_part)
            for name, gradient in gradients._asdict().items():
                if gradient is not None:
                    place = queries if name == "query" else keys if name in KEYS else ()
                    sums[name][:, *place] += gradient
        merged, merged_lse = cuneigh.merge_attentions(*zip(*parts, strict=True))
        close(merged, output[:, *queries])
        close(merged_lse, lse[:, *queries])
    for name, total in sums.items():
        close(total, getattr(whole, name))


# What users did by hand


@given(rng=generators(), shift=st.integers(0, 8), stride=st.integers(1, 3))
def test_a_ring_is_turned_with_its_arrays(rng, shift, stride):
    query, key, value = rng.standard_normal((3, 1, 5, 9, 2, 4))
    shift *= stride  # whole stride groups, which begin at token 0
    window = {"kernel_size": (3, 4), "stride": (1, stride), "border": ("cut", "wrap")}
    if 9 % stride:
        shift = 0
    turned = [np.roll(array, shift, 2) for array in (query, key, value)]
    wanted = np.roll(cuneigh.na2d(query, key, value, **window), shift, 2)
    close(cuneigh.na2d(*turned, **window), wanted)


def test_a_ring_is_what_padding_and_cropping_make_of_it():
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 1, 12, 2, 4))
    padded = [np.pad(a, [(0, 0), (2, 2), (0, 0), (0, 0)], "wrap") for a in (query, key, value)]
    wanted = cuneigh.na1d(*padded, kernel_size=5)[:, 2:-2]
    close(cuneigh.na1d(query, key, value, kernel_size=5, border="wrap"), wanted)


def test_a_part_is_what_is_cut_out_of_the_whole():
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 20, 2, 4))
    wanted = cuneigh.na1d(query, key, value, kernel_size=5)[:, 8:12]
    halo = slice(6, 14)
    part = {"layout": 20, "query_start": 8, "key_start": 6}
    close(cuneigh.na1d(query[:, 8:12], key[:, halo], value[:, halo], 5, **part), wanted)


@given(
    problem=problems(operations=("forward",), ordinary=False, **SMALL).filter(
        lambda p: p.rpb_dtype is None and p.additional is None and p.group_size == 1
    ),
    rng=generators(),
)
def test_borders_and_masks_are_a_dense_mask(problem, rng):
    function, arguments = arguments_of(problem, inputs(problem, rng))
    output, lse = getattr(cuneigh, function)(**arguments | {"return_lse": True})
    visible = brute_force.visible_mask(problem)
    query, key, value = (
        np.nan_to_num(arguments[n]).reshape(
            problem.batch, -1, problem.heads, arguments[n].shape[-1]
        )
        for n in ("query", "key", "value")
    )
    for b in range(problem.batch):
        mask = visible
        if problem.has_key_mask:
            mask = visible & arguments["key_mask"][b].reshape(-1)
        sees = mask.any(1)
        one = [each[b : b + 1] for each in (query, key, value)]
        one[0] = one[0][:, sees]
        dense, dense_lse = brute_force.dense(*one, mask[sees], problem.scale)
        flat = output[b].reshape(len(mask), problem.heads, -1)
        close(flat[sees], dense[0])
        close(lse[b].reshape(len(mask), -1)[sees], dense_lse[0])
        assert (flat[~sees] == 0).all()
        assert (lse[b].reshape(len(mask), -1)[~sees] == -np.inf).all()


# Other libraries


def mean(value: np.ndarray, **arguments: Any) -> np.ndarray:
    """What windows average: attention with zero queries."""
    zeros = np.zeros((1, *value.shape, 1, 1))
    output = cuneigh.na2d(zeros, zeros, value[None, ..., None, None], **arguments)
    return output[0, ..., 0, 0]


@pytest.mark.parametrize("size", [(3, 5), (4, 2), (7, 8)])
def test_means_are_those_of_scipy(size):
    filters = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    value, mask = rng.standard_normal((9, 11)), rng.random((9, 11)) < 0.6

    def average(array: np.ndarray, mode: str) -> np.ndarray:
        return filters.uniform_filter(array.astype(float), size, mode=mode)

    close(mean(value, kernel_size=size, border="wrap"), average(value, "wrap"))
    ones = average(np.ones_like(value), "constant")
    close(mean(value, kernel_size=size, border="cut"), average(value, "constant") / ones)
    for border, mode in (("wrap", "wrap"), ("cut", "constant")):  # normalized convolution
        seen = average(mask, mode)
        wanted = np.divide(average(value * mask, mode), seen, where=seen > 1e-9, out=0 * value)
        close(mean(value, kernel_size=size, border=border, key_mask=mask[None]), wanted)


@pytest.mark.parametrize(("left", "right"), [(3, 3), (4, 3), (40, 40), (0, 0)])
def test_a_cut_window_is_a_local_window_of_jax(left, right):
    jax = pytest.importorskip("jax")
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 17, 2, 4), np.float32)
    wanted = jax.nn.dot_product_attention(query, key, value, local_window_size=(left, right))
    got = cuneigh.na1d(query, key, value, kernel_size=left + right + 1, border="cut")
    close(got, np.asarray(wanted))


# Keys that are not there


def test_a_query_that_sees_nothing_gets_nothing():
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 9, 2, 4))
    mask = np.ones((1, 9), bool)
    mask[:, :5] = False
    key[:, :5] = value[:, :5] = np.nan
    seen = {"kernel_size": 3, "key_mask": mask}
    output, lse = cuneigh.na1d(query, key, value, **seen, return_lse=True)
    assert (output[:, :4] == 0).all()
    assert (lse[:, :4] == -np.inf).all()
    assert np.isfinite(output).all()
    backward = cuneigh.na1d_backward(np.ones_like(output), query, key, value, output, lse, **seen)
    assert (backward.query[:, :4] == 0).all()
    assert (backward.key[:, :5] == 0).all()
    assert (backward.value[:, :5] == 0).all()
    assert all(np.isfinite(array).all() for array in backward[:3])


def test_without_given_keys_additional_ones_are_attended_to_alone():
    rng = np.random.default_rng(0)
    query, extra = rng.standard_normal((1, 6, 2, 4)), rng.standard_normal((2, 1, 3, 2, 4))
    none = np.zeros((1, 0, 2, 4))
    part = {"kernel_size": 3, "layout": 20, "query_start": 4}
    given_too = {"additional_keys": extra[0], "additional_values": extra[1]}
    output, lse = cuneigh.na1d(query, none, none, **part, **given_too, return_lse=True)
    wanted = cuneigh.attention(query, *extra, return_lse=True)
    close(output, wanted[0])
    close(lse, wanted[1])
    gradients = cuneigh.na1d_backward(
        np.ones_like(output), query, none, none, output, lse, **part, **given_too
    )
    assert abs(gradients.additional_values).sum() > 0
    assert gradients.key.shape == none.shape
    alone, lse = cuneigh.na1d(query, none, none, **part, return_lse=True)
    assert (alone == 0).all()
    assert (lse == -np.inf).all()
    assert (cuneigh.na1d_qk(query, none, **part) == -np.inf).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_takes_a_mask(is_causal):
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 8, 2, 4))
    mask = np.arange(8) < np.array([[5], [8]])
    key[~mask] = np.nan
    output = cuneigh.attention(query, key, value, is_causal, key_mask=mask)
    close(output[1:], cuneigh.attention(query[1:], key[1:], value[1:], is_causal))
    short = cuneigh.na1d(query[:1], key[:1, :5], value[:1, :5], 8, layout=8, is_causal=is_causal)
    close(output[:1], short)


# Other starts


def test_other_starts_are_examined_like_the_first():
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 8, 1, 4))

    def part(**starts: Any) -> np.ndarray:
        return cuneigh.na1d(query, key, value, 3, layout=20, **starts)

    for start in (0, 5, 12):
        wanted = np.full((1, 20, 1, 4), np.nan)
        wanted[:, start : start + 8] = value
        seen = cuneigh.na1d(
            *(np.nan_to_num(wanted),) * 3, 3, key_mask=~np.isnan(wanted[..., 0, 0]), scale=0.0
        )
        got = cuneigh.na1d(
            query, key, value, 3, layout=20, query_start=start, key_start=start, scale=0.0
        )
        close(got, seen[:, start : start + 8])
    with pytest.raises(ValueError, match="query_start=13 plus the 8 tokens of query on axis 0"):
        part(query_start=13)
    with pytest.raises(TypeError, match=r"key_start=False is bool"):
        part(key_start=False)
    cuneigh.na1d(query, key, value, 3)
    with pytest.raises(TypeError, match=r"query_start=0.0 is float"):
        cuneigh.na1d(query, key, value, 3, query_start=0.0)
    with pytest.raises(ValueError, match=r"query_start=1 on axis 0 needs layout"):
        cuneigh.na1d(query, key, value, 3, query_start=1)
