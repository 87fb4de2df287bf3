"""The plan of layouts in shards against the keys that queries see, one by one."""

from __future__ import annotations

import itertools

import numpy as np
from helpers.brute_force import visible_keys
from hypothesis import given, settings
from hypothesis import strategies as st

from cuneigh._shards.axis import Shards, chunks
from cuneigh._shards.plan import Box, Plan
from cuneigh._window import BORDERS, Axis


@st.composite
def shards(draw, longest: int = 24) -> Shards:
    """A legal axis with any border, in up to five shards of any sizes."""
    border = draw(st.sampled_from(BORDERS))
    dilation = draw(st.sampled_from([1, 1, 2, 3, 5]))
    groups = draw(st.integers(1, max(longest // dilation, 1)))
    layout = groups * dilation
    if border != "wrap":
        layout += draw(st.integers(0, dilation - 1))
    kernel_size = draw(st.integers(1, groups + 5 * (border == "cut")))
    is_causal = border != "wrap" and draw(st.booleans())
    stride = draw(st.integers(1, kernel_size))
    axis = Axis(layout, layout, kernel_size, stride, dilation, is_causal, border)
    cuts = draw(st.lists(st.integers(0, layout), max_size=4).map(sorted))
    return Shards(axis, tuple(np.diff([0, *cuts, layout]).tolist()))


def seen_along(axis: Axis, query: int) -> set[int]:
    return set(visible_keys(axis, query))


def seen_of(one: Shards, queries) -> set[int]:
    """The keys of the layout that some of its queries see."""
    return set().union(*(seen_along(one.axis, query) for query in queries))


@settings(max_examples=40)
@given(shards())
def test_the_range_of_keys_is_what_the_queries_see_and_no_key_more(one):
    for shard, size in enumerate(one.sizes):
        own, seen = one.own(shard), one.seen(shard)
        expected = seen_of(one, range(*own))
        tokens = [token % one.layout for token in range(*seen)]
        assert len(tokens) == len(set(tokens))
        assert expected <= set(tokens)
        assert own.within(seen) or not size
        if seen.length < one.layout:
            assert {tokens[0], tokens[-1]} <= expected if size else not tokens


@settings(max_examples=40)
@given(shards())
def test_inner_queries_are_the_longest_range_that_sees_own_keys_only(one):
    for shard in range(len(one.sizes)):
        own, inner = one.own(shard), one.inner(shard)
        alone = [seen_along(one.axis, query) <= set(range(*own)) for query in range(*own)]
        assert all(alone[query - own.start] for query in range(*inner))
        runs = [len(list(run)) for is_alone, run in itertools.groupby(alone) if is_alone]
        if one.seen(shard).length < one.layout or one.axis.border != "wrap":
            assert inner.length == max(runs, default=0)


def of_box(box: Box, axes: tuple[Shards, ...]) -> list[tuple[int, ...]]:
    """The tokens of a box, those of a ring brought back to its first lap."""
    along = [
        [token % one.layout for token in range(*tokens)]
        for one, tokens in zip(axes, box.ranges, strict=True)
    ]
    return list(itertools.product(*along))


@settings(max_examples=40)
@given(st.lists(shards(6), min_size=1, max_size=2))
def test_messages_bring_every_key_that_is_seen_once(many):
    axes = tuple(many)
    plans = [Plan(axes, rank) for rank in range(Plan(axes, 0).ranks)]
    moved = 0
    for plan in plans:
        own = of_box(plan.own, axes) if plan.own.tokens else []
        got = []
        for other in plans:
            sent, received = other.sent[plan.rank], plan.received[other.rank]
            assert [box.shape for box in sent] == [box.shape for box in received]
            for here, there in zip(sent, received, strict=True):
                assert here.within(other.own)
                assert there.within(plan.seen)
                assert of_box(here, axes) == of_box(there, axes)
                got += of_box(there, axes)
        moved += len(got)
        assert sorted([*own, *got]) == sorted(of_box(plan.seen, axes))
        if plan.own.tokens:
            along = zip(axes, plan.own.ranges, strict=True)
            seen = [seen_of(one, range(*queries)) for one, queries in along]
            assert set(itertools.product(*seen)) <= {*own, *got}
    assert all(plan.exchanges == (moved > 0) for plan in plans)


@settings(max_examples=40)
@given(st.lists(shards(8), min_size=1, max_size=2))
def test_pieces_are_all_queries_and_the_first_sees_own_keys_only(many):
    axes = tuple(many)
    for rank in range(Plan(axes, 0).ranks):
        plan = Plan(axes, rank)
        for works in (plan.whole, plan.pieces):
            queries = [query for work in works for query in of_box(work.queries, axes)]
            assert sorted(queries) == sorted(of_box(plan.own, axes))
            for work in works:
                assert work.keys.within(plan.seen)
                for one, of_queries, keys in zip(
                    axes, *work.queries[:1], *work.keys[:1], strict=True
                ):
                    given_keys = {token % one.layout for token in range(*keys)}
                    assert seen_of(one, range(*of_queries)) <= given_keys
        if len(plan.pieces) > 1:
            assert plan.pieces[0].keys == plan.own


def test_chunks_are_those_of_torch():
    assert chunks(9, [4]) == (3, 3, 3, 0)
    assert chunks(15, [2]) == (8, 7)
    assert chunks(2, [4]) == (1, 1, 0, 0)
    assert chunks(0, [2]) == (0, 0)
    assert chunks(9, [2, 3]) == (2, 2, 1, 2, 2, 0)
    assert chunks(9, []) == (9,)
