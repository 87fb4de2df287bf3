"""Starts of parts of a layout that are known only when a program runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.calls import framework
from helpers.strategies import array

import cuneigh
from cuneigh._problem import Spec

jax = pytest.importorskip("jax")
jnp = jax.numpy

LAYOUT, PART = (7, 12), (3, 5)
SHAPE = (2, *LAYOUT, 2, 4)
STARTS = [(0, 0), (2, 7), (4, 3)]


@pytest.fixture(params=["jax", pytest.param("jax-cuda", marks=pytest.mark.gpu)])
def arrays(request):
    draw = np.random.default_rng(0)
    return [framework(request.param).of(array(Spec(SHAPE, "float32"), draw)) for _ in range(3)]


def part_of(query: Any, start: Any) -> Any:
    """The queries of a part."""
    size = (query.shape[0], *PART, *query.shape[3:])
    return jax.lax.dynamic_slice(query, (0, *start, 0, 0), size)


def call(query: Any, key: Any, value: Any, start: Any, **parameters: Any) -> Any:
    given = {"kernel_size": (3, 4), "dilation": (2, 1), "border": ("shift", "wrap"), **parameters}
    return cuneigh.na2d(
        part_of(query, start), key, value, **given, layout=LAYOUT, query_start=tuple(start)
    )


def whole(query: Any, key: Any, value: Any, start: Any) -> Any:
    return part_of(
        cuneigh.na2d(query, key, value, (3, 4), dilation=(2, 1), border=("shift", "wrap")), start
    )


def close(got: Any, wanted: Any) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3), got, wanted)


def test_one_program_serves_all_starts(arrays):
    program = jax.jit(call)
    for start in STARTS:
        close(program(*arrays, start), whole(*arrays, start))
    assert program._cache_size() == 1
    text = program.lower(*arrays, (0, 0)).compile().as_text()
    assert text.count('custom_call_target="cuneigh"') == 1


def test_derivatives_and_maps(arrays):
    def total(of, *given):
        return (of(*given) ** 2).sum()

    every = (0, 1, 2)
    starts = np.array(STARTS)
    got = jax.vmap(jax.grad(partial(total, call), every), (None, None, None, 0))(*arrays, starts)
    one = jax.jit(jax.grad(partial(total, whole), every))
    for i, start in enumerate(STARTS):
        close([each[i] for each in got], list(one(*arrays, start)))
    moved = jax.jvp(lambda *given: call(*given, starts[1]), arrays, arrays)
    traced = jax.jit(lambda s: jax.jvp(lambda *given: call(*given, s), arrays, arrays))
    close(traced(starts[1]), moved)


def test_a_part_of_the_keys_is_joined_to_another(arrays):
    query, key, value = arrays

    @jax.jit
    def halves(cut):
        made = []
        for first in (0, cut):
            keys = [jax.lax.dynamic_slice_in_dim(each, first, 6, 2) for each in (key, value)]
            start = (0, first)
            made.append(
                cuneigh.na2d(query, *keys, 5, layout=LAYOUT, key_start=start, return_lse=True)
            )
        return cuneigh.merge_attentions(*zip(*made, strict=True))[0]

    close(halves(6), cuneigh.na2d(query, key, value, 5))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ((5, 0), "na2d: query_start=5 plus the 3 tokens of query on axis 0 is 8, which exceeds"),
        ((-1, 0), "na2d: query_start=-1 on axis 0 must not be negative"),
        ((0, 2**31 - 1), "na2d: query_start on axis 1 is 2147483647 or beyond"),
    ],
)
def test_a_program_refuses_a_start_that_is_none(arrays, start, message):
    query, key, value = arrays
    short = part_of(query, (0, 0))
    program = jax.jit(
        lambda start: cuneigh.na2d(
            short, key, value, 3, layout=LAYOUT, query_start=start, border=("shift", "wrap")
        )
    )
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(program(start))


def test_what_is_refused_while_it_is_traced(arrays):
    def trace(start, **given):
        attend = partial(cuneigh.na2d, *arrays, 3, **{"layout": LAYOUT, **given})
        return jax.jit(lambda start: attend(query_start=start))(start)

    with pytest.raises(ValueError, match="na2d: query_start and key_start need layout"):
        trace(0, layout=None)
    with pytest.raises(TypeError, match=r"query_start=.* is .*, not an int"):
        trace(0.5)
    with pytest.raises(TypeError, match="a tuple with an entry for each of the 2 token axes"):
        trace(np.array([0, 0]))
    with pytest.raises(ValueError, match=r"query_start=.* has 3 entries, but there are 2 token"):
        trace((0, 0, 0))
    attend = partial(cuneigh.na2d, *arrays, 3, layout=LAYOUT)
    with pytest.raises(TypeError, match=r"key_start\[1\]=True is bool"):
        jax.jit(lambda start: attend(query_start=start, key_start=(0, True)))(0)
