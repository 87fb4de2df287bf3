"""Calls of NATTEN's functions, in the manner of every generation, and whose a call is."""

from __future__ import annotations

import inspect
import itertools
import pickle
import sys
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuneigh

torch = pytest.importorskip("torch")

from helpers.dense_window import attention as dense  # noqa: E402
from helpers.generations import choosing, installing  # noqa: E402, F401 - fixtures

from cuneigh.compat import natten  # noqa: E402
from cuneigh.compat.natten import functional  # noqa: E402
from cuneigh.compat.natten._calls import SYNONYMS, settle  # noqa: E402
from cuneigh.compat.natten._generations import FUNCTIONS, MODULES  # noqa: E402

# Whose a call is


def tokens(rank: int, count: int = 3, *, heads_first: bool = False) -> list:
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 6, 5)[:rank]
    shape = (2, 2, *sizes, 4) if heads_first else (2, *sizes, 2, 4)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(count)
    ]


QUERY, KEY, VALUE = tokens(1)
CUBE = torch.randn(1, 2, 6, 6, 6, 4)
WEIGHTS = torch.randn(1, 2, 6, 6, 6, 27)

AMBIGUOUS = [
    ("na1d", (QUERY, KEY, VALUE, 3, 2), ["argument 5, 2, is dilation in 0.17; stride in 0.20"]),
    ("na1d", (QUERY, KEY, VALUE, 3, 1, True), ["is_causal in 0.17; dilation in 0.20, 0.21"]),
    (
        "na3d_qk",
        (CUBE, CUBE, 3, 3, 1, 1),
        ["argument 3, 3, is kernel_size_d in 0.15; kernel_size in 0.17", "argument 6, 1, is "],
    ),
    ("na3d_av", (WEIGHTS, CUBE, 3, 3, 1, 1), ["argument 4, 3, is kernel_size in 0.15; dilation"]),
    ("attention", (QUERY, KEY, VALUE, True), ["True, is scale in 0.20; is_causal in 0.21"]),
    (
        "NeighborhoodAttention1D",
        (8, 2, 3, 2),
        ["argument 4, 2, is dilation in 0.14, 0.15, 0.17; stride in 0.20, 0.21"],
    ),
    (
        "NeighborhoodAttention3D",
        (8, 2, 3, 2),
        ["is kernel_size_d in 0.15; dilation in 0.17; stride in 0.20, 0.21"],
    ),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_have_the_arguments_of_every_generation(name):
    protocol = typing.get_type_hints(functional)[name]
    call = f"{protocol.__qualname__}.__call__"
    overloads = typing.get_overloads(
        types.SimpleNamespace(__module__=protocol.__module__, __qualname__=call)
    )
    typed = [
        set(inspect.signature(each).parameters) - {"self"}
        for each in overloads or [protocol.__call__]
    ]
    of_forms = [set(form.names) for form in FUNCTIONS[name]]
    assert all(any(names <= each for each in typed) for names in of_forms)
    assert set().union(*typed) == set().union(*of_forms)


@pytest.mark.parametrize(("name", "args", "meanings"), AMBIGUOUS)
def test_arguments_by_position_whose_meaning_changed_are_not_guessed(name, args, meanings):
    function = getattr(functional, name, None) or getattr(natten, name)
    with pytest.raises(TypeError) as caught:
        function(*args)
    message = str(caught.value)
    assert message.startswith(f"natten.{name}: the meaning of what is given by position changed")
    assert "cuneigh.compat.natten.install(generation=..)" in message
    for meaning in meanings:
        assert meaning in message


@pytest.mark.parametrize(
    ("name", "own", "given", "meant"),
    [
        ("na2d", "0.17", (3, 2), {"dilation": 2}),
        ("na2d", "0.20", (3, 2), {"stride": 2}),
        ("na2d", "0.21", (3, 2, 1, True), {"stride": 2, "is_causal": True}),
        ("na2d", "0.17", (3, 1, True), {"is_causal": True}),
    ],
)
def test_a_generation_settles_what_is_given_by_position(name, own, given, meant, generation):
    generation(own)
    query, key, value = tokens(2)
    output = getattr(natten, name)(query, key, value, *given)
    torch.testing.assert_close(output, dense(query, key, value, 3, **meant))


def test_a_generation_settles_what_modules_are_given_by_position(generation):
    generation("0.17")
    assert natten.NeighborhoodAttention2D(8, 2, 3, 2).dilation == (2, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'stride'"):
        natten.NeighborhoodAttention2D(8, 2, 3, stride=2)


def test_the_other_generations_settle_it_for_modules(generation):
    generation("0.21")
    module = natten.NeighborhoodAttention2D(8, 2, 3, 2)
    assert (module.stride, module.dilation) == ((2, 2), (1, 1))


def test_what_one_generation_alone_accepts_is_of_that_one():
    query, key, value = tokens(2)
    rpb = torch.randn(2, 5, 5, dtype=torch.float64)
    output = natten.na2d(query, key, value, 3, 2, rpb=rpb)  # 0.20 has no rpb
    torch.testing.assert_close(output, dense(query, key, value, 3, dilation=2, rpb=rpb))
    plain = natten.NeighborhoodAttention2D(8, 2, 3, 2, bias=False)  # 0.17 has no bias
    assert (plain.dilation, plain.window_size, plain.rpb) == (2, 6, None)
    assert natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True).kernel_size == (3, 3)
    logits = functional.na3d_qk(CUBE, CUBE, 3, 2)  # 0.15 needs four sizes
    assert torch.equal(logits, functional.na3d_qk(CUBE, CUBE, 3, dilation=2))


def test_what_no_generation_accepts_says_who_knows_what():
    with pytest.raises(TypeError, match=r"no release .* stride \(0.20, 0.21\), rpb \(0.17\)"):
        natten.na1d(QUERY, KEY, VALUE, 3, stride=2, rpb=torch.zeros(2, 5))
    assert natten.na1d(QUERY, KEY, VALUE, 3, stride=2, rpb=None).shape == QUERY.shape
    with pytest.raises(TypeError, match=r"natten\.na1d_qk: .*takes 2 arguments by position"):
        natten.na1d_qk(QUERY, KEY)


FORMS = {**FUNCTIONS, **{f"NeighborhoodAttention{rank}D": MODULES[rank] for rank in MODULES}}


@given(st.data())
def test_every_call_is_of_the_newest_generation_or_refused(data):
    """Whether a generation accepts a call is what Python's own binding says."""
    forms = FORMS[data.draw(st.sampled_from(sorted(FORMS)))]
    names = sorted({name for form in forms for name in form.names})
    args = list(range(data.draw(st.integers(0, 9))))
    kwargs = dict.fromkeys(data.draw(st.sets(st.sampled_from(names), max_size=4)), "by name")
    kwargs.update(dict.fromkeys(forms[-1].required[len(args) :], "needed"))
    bound = []
    for form in forms:
        try:
            bound.append(inspect.signature(form.function).bind(*args, **kwargs))
        except TypeError:
            continue
        newest = form
    meanings = [
        {SYNONYMS.get(name, name): value for name, value in each.arguments.items()}
        for each in bound
    ]
    if not bound:
        with pytest.raises(TypeError, match=r"no release of NATTEN takes|are one argument"):
            settle("call", forms, args, kwargs)
    elif any(each != meanings[0] for each in meanings):
        with pytest.raises(TypeError, match="the meaning of what is given by position changed"):
            settle("call", forms, args, kwargs)
    else:
        assert settle("call", forms, args, kwargs) == (newest.function, kwargs)


def test_generations_have_names_and_there_is_one(generation):
    with pytest.raises(ValueError, match=r"generation='0\.16' is not one of '0\.14', '0\.15', "):
        natten.use_generation("0.16")
    generation("0.21")
    natten.use_generation("0.21")
    with pytest.raises(RuntimeError, match=r"'0\.17' comes too late: this process uses that of 0"):
        natten.use_generation("0.17")
    with pytest.raises(AttributeError, match=r"na1d_qk is not there in NATTEN 0\.21, .* 0\.15, 0"):
        natten.na1d_qk(QUERY, KEY, 3)
    assert pickle.loads(pickle.dumps(natten.na1d)) is natten.na1d


# Functions of every generation, as their clients call them


@pytest.mark.parametrize("rank", [1, 2])
def test_0_14(rank, install):
    """Queries are scaled before; what the halves are given is heads-first."""
    own = install(generation="0.14").functional
    query, key, value = tokens(rank, heads_first=True)
    rpb = torch.randn(2, *[5] * rank, dtype=torch.float64, requires_grad=True)
    qkrpb, qk, av = (getattr(own, f"natten{rank}d{half}") for half in ("qkrpb", "qk", "av"))
    last = [tensor.movedim(1, -2) for tensor in (query, key, value)]
    for bias in (rpb, None):
        weights = qkrpb(query * 0.5, key, bias, 3, 2).softmax(dim=-1)
        output = av(weights, value, 3, 2)
        wanted = dense(*last, 3, dilation=2, scale=0.5, rpb=bias).movedim(-2, 1)
        torch.testing.assert_close(output, wanted)
        given = [query, key, value] + [rpb] * (bias is not None)
        got, expected = (torch.autograd.grad(x.sin().sum(), given) for x in (output, wanted))
        torch.testing.assert_close(got, expected)
    assert torch.equal(qkrpb(query, key, None, 3, 2), qk(query, key, 3, 2))
    assert torch.equal(qk(query, key, 3, None), qk(query, key, 3, 1))
    # Early releases had shorter lists of arguments: the bias, the weights tell the size
    assert torch.equal(qkrpb(query, key, rpb, 2), qkrpb(query, key, rpb, 3, 2))
    assert torch.equal(av(weights, value, 2), av(weights, value, 3, 2))
    assert torch.equal(av(weights, value, dilation=2), av(weights, value, 3, 2))
    with pytest.raises(TypeError, match="kernel_size is missing, and there is no rpb to tell it"):
        qkrpb(query, key, None, 2)
    apply = getattr(own, f"NATTEN{rank}DQKRPBFunction").apply
    assert torch.equal(apply(query, key, rpb, 3, 2), qkrpb(query, key, rpb, 3, 2))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_0_15(rank, install):
    own = install(generation="0.15").functional
    query, key, value = tokens(rank, heads_first=True)
    additional = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    window = (3, 5, 1, 1) if rank == 3 else (3, 2)
    sizes, dilation = ((3, 5, 5), 1) if rank == 3 else (3, 2)
    rpb = torch.randn(2, *([5, 9, 9] if rank == 3 else [5] * rank), dtype=torch.float64)
    qk, with_bias, av = (getattr(own, f"na{rank}d_{n}") for n in ("qk", "qk_with_bias", "av"))
    last = [tensor.movedim(1, -2) for tensor in (query, key, value)]
    output = av(with_bias(query, key, rpb, *window).softmax(-1), value, *window)
    wanted = dense(*last, sizes, dilation=dilation, scale=1.0, rpb=rpb)
    torch.testing.assert_close(output, wanted.movedim(-2, 1))
    assert torch.equal(with_bias(query, key, None, *window), qk(query, key, *window))
    logits = with_bias(query, key, rpb, *window, additional_keys=additional)
    old = getattr(own, f"natten{rank}dqkrpb")(query, key, rpb, *window)
    torch.testing.assert_close(logits[..., :-3], old)
    more = getattr(own, f"natten{rank}dqk")(query, key, *window, additional)
    torch.testing.assert_close(logits[..., -3:], more[..., -3:])
    weights = logits.softmax(-1)
    joined = getattr(own, f"natten{rank}dav")(weights, value, *window, additional)
    torch.testing.assert_close(
        joined, av(weights[..., :-3], value, *window) + _cross(weights[..., -3:], additional)
    )


def _cross(weights: torch.Tensor, additional: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bh...n,bhnd->bh...d", weights, additional)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_0_17(rank, install):
    installed = install(generation="0.17")
    own, experimental = installed.functional, sys.modules["natten.experimental"]
    query, key, value = tokens(rank)
    rpb = torch.randn(2, *[5] * rank, dtype=torch.float64)
    name, sizes = f"na{rank}d", [3] * rank
    output = getattr(own, name)(query, key, value, sizes, None, None, rpb, 0.3)
    torch.testing.assert_close(output, dense(query, key, value, 3, scale=0.3, rpb=rpb))
    cast = getattr(own, name)(*[x.float() for x in (query, key, value)], 3, rpb=rpb)
    torch.testing.assert_close(cast, dense(query, key, value, 3, rpb=rpb).float())
    causal = getattr(experimental, name)(query, key, value, 3, 1, True, xformers_kwargs={})
    torch.testing.assert_close(causal, dense(query, key, value, 3, is_causal=True))
    with pytest.raises(NotImplementedError, match=r"xformers_kwargs\['p'\] has no counterpart"):
        getattr(own, name)(query, key, value, 3, xformers_kwargs={"p": 0.1})
    first = [tensor.movedim(-2, 1) for tensor in (query, key, value)]
    qk, av = getattr(own, f"{name}_qk"), getattr(own, f"{name}_av")
    weights = qk(*first[:2], sizes, None, None, [False] * rank, rpb).softmax(-1)
    halves = av(weights, first[2], kernel_size=sizes, dilation=None, is_causal=None)
    wanted = dense(query, key, value, 3, scale=1.0, rpb=rpb).movedim(-2, 1)
    torch.testing.assert_close(halves, wanted)


@pytest.mark.parametrize("own", ["0.20", "0.21"])
def test_0_20_and_0_21(own, install):
    installed = install(generation=own)
    query, key, value = tokens(2)
    tuning = {"backend": "cutlass-fna", "attention_kwargs": {"backend": "cutlass-fmha"}}
    output = installed.na2d(query, key, value, [3, 5], (1, 2), None, **tuning)
    torch.testing.assert_close(output, dense(query, key, value, (3, 5), stride=(1, 2)))
    generic = installed.functional.neighborhood_attention_generic
    assert torch.equal(generic(query, key, value, [3, 5], (1, 2)), output)
    with pytest.raises(NotImplementedError, match=r"attention_kwargs\['is_causal'\] has no count"):
        installed.na2d(query, key, value, 3, attention_kwargs={"is_causal": True})
    flat = [tensor.detach().flatten(1, 2) for tensor in (query, key, value)]
    wanted = dense(*flat, 42, scale=0.3)
    if own == "0.20":
        output = installed.attention(*flat, 0.3)
        assert "return_lse" not in inspect.signature(installed.na2d).parameters
    else:
        output, _ = installed.attention(*flat, False, 0.3, return_lse=True, max_seqlen_Q=0)
    torch.testing.assert_close(output, wanted)


def test_merging_returns_an_lse_since_0_21_5(install):
    outputs, lses = list(torch.randn(2, 2, 7, 2, 4)), list(torch.randn(2, 2, 7, 2))
    output, lse = natten.merge_attentions(outputs, lses)
    assert (output.shape, lse.shape) == ((2, 7, 2, 4), (2, 7, 2))
    wanted = cuneigh.merge_attentions(outputs, lses)
    assert torch.equal(output, wanted[0])
    assert torch.equal(lse, wanted[1])
    halves = [lse.bfloat16() for lse in lses]
    assert natten.merge_attentions(outputs, halves)[1].dtype == torch.float32
    old = install(generation="0.20")
    assert torch.equal(old.merge_attentions(outputs, lses, torch_compile=False), output)


def test_no_result_depends_on_strides():
    """As many columns as heads, of tokens that lie in memory in every order."""
    rpb = torch.randn(6, 5, 5)
    shape = 1, 6, 9, 6, 8  # 6 heads, 9 rows, 6 columns
    wanted = query = torch.randn(shape)
    value = torch.randn(shape)
    wanted = functional.natten2dqkrpb(query, query, rpb, 3, 1)
    for order in itertools.permutations(range(1, 5)):
        inverse = [0, *(order.index(axis) + 1 for axis in range(1, 5))]
        stored = [x.permute(0, *order).contiguous().permute(inverse) for x in (query, value)]
        assert torch.equal(functional.natten2dqkrpb(stored[0], stored[0], rpb, 3, 1), wanted)
        got = functional.natten2dav(wanted, stored[1], 3, 1)
        assert torch.equal(got, functional.natten2dav(wanted, value, 3, 1))


def test_weights_and_biases_are_cast_since_0_15(install):
    query = torch.randn(1, 2, 6, 6, 4, dtype=torch.bfloat16)
    rpb = torch.randn(2, 5, 5)
    logits = functional.na2d_qk(query, query, 3, rpb=rpb)
    assert torch.equal(logits, functional.na2d_qk(query, query, 3, rpb=rpb.bfloat16()))
    assert functional.natten2dqkrpb(query, query, rpb.double(), 3, 1).dtype == torch.bfloat16
    weights = logits.float().softmax(-1)
    output = functional.na2d_av(weights, query, 3)
    assert torch.equal(output, functional.na2d_av(weights.bfloat16(), query, 3))
    old = install(generation="0.14").functional
    with pytest.raises(TypeError, match=r"natten\.natten2dav: .* value has dtype bfloat16, but"):
        old.natten2dav(weights, query, 3, 1)


# Bad input


def test_nested_tensors_are_refused_by_name():
    parts = [torch.randn(2, 6, 4), torch.randn(2, 7, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for call in (
        lambda: natten.na1d_qk(nested, nested, 3),
        lambda: natten.na1d_av(nested, nested, 3),
        lambda: natten.na1d(nested, nested, nested, 3),
        lambda: natten.attention(nested, nested, nested),
    ):
        with pytest.raises(NotImplementedError, match=r"natten\.\w+: \w+ is a nested tensor"):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q: functional.na2d_qk(q, q, None), r"na2d_qk: .*kernel_size=None is NoneType"),
        (lambda q: functional.na2d_qk(q[0], q, 3), r"query has 4 axes, but 5 are .*heads, X1, X2"),
        (lambda q: functional.na2d_qk(q, q[..., :3, :], 3), r"natten\.na2d_qk: with heads moved "),
        (lambda q: functional.na2d_qk(q.numpy(), q, 3), "query is of type ndarray; a torch.Tensor"),
        (lambda q: functional.na2d_av(q, q, 3), r"natten\.na2d_av: .* weights has size 4 on axis"),
    ],
)
def test_bad_input_names_call_and_argument(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(torch.randn(1, 2, 6, 7, 4))
