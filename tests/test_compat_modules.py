"""NATTEN's modules of every generation: arguments, attributes, parameters, padding, pickles."""

from __future__ import annotations

import io
import sys
import types

import pytest

torch = pytest.importorskip("torch")

from helpers.dense_window import attention as dense  # noqa: E402
from helpers.generations import choosing, installing  # noqa: E402, F401 - fixtures
from torch import nn  # noqa: E402

import cuneigh.torch  # noqa: E402
from cuneigh.compat import natten  # noqa: E402
from cuneigh.compat.natten.modules import NeighborhoodAttentionGeneric  # noqa: E402

SIZES = (9, 7, 6)


def expected(module, x, kernel_size, **window):
    """What a module of 4 heads computes of a map that is not smaller than its window."""
    dim = x.shape[-1] // 4
    query, key, value = module.qkv(x).unflatten(-1, (3, 4, dim)).unbind(-3)
    output = dense(query, key, value, kernel_size, scale=module.scale, rpb=module.rpb, **window)
    return module.proj(output.flatten(-2))


def tokens(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *lengths, 8, generator=generator, dtype=torch.float64)


def state_of(module) -> dict:
    """Random numbers under the names and shapes that this generation's modules have."""
    return {name: torch.randn_like(array) for name, array in module.state_dict().items()}


def of(own, rank, install, *args, **kwargs):
    """A module of `own` with random weights."""
    kind = getattr(install(own), f"NeighborhoodAttention{rank}D")
    module = kind(*args, **kwargs).double()
    module.load_state_dict(state_of(module))
    return module


LINEAR = {"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8), "proj.bias": (8,)}


# Each generation


@pytest.mark.parametrize(("own", "rank"), [("0.14", 1), ("0.14", 2), ("0.15", 1), ("0.15", 2)])
def test_0_14_and_0_15(own, rank, install):
    module = of(own, rank, install, 8, 4, 3, 2)
    assert {"kernel_size": 3, "dilation": 2, "window_size": 6}.items() <= vars(module).items()
    assert (module.num_heads, module.head_dim, module.scale) == (4, 2, 2**-0.5)
    assert not hasattr(module, "is_causal")
    assert not hasattr(module, "stride")
    shapes = {name: tuple(array.shape) for name, array in module.state_dict().items()}
    assert shapes == {"rpb": (4, *[5] * rank), **LINEAR}
    x = tokens(*SIZES[:rank])
    torch.testing.assert_close(module(x), expected(module, x, 3, dilation=2))
    kind = type(module)
    assert kind(8, 4, 3, None, False, False, 0.5, 0.1, 0.2).rpb is None
    assert kind(8, 4, kernel_size=3, dilation=None).window_size == 3
    with pytest.raises(TypeError, match=rf"{kind.__name__}: kernel_size=\[3, 3\] is list, not an"):
        kind(8, 4, [3, 3])
    with pytest.raises(TypeError, match="unexpected keyword argument 'rel_pos_bias'"):
        kind(8, 4, 3, rel_pos_bias=True)


def test_0_15_in_three_dimensions(install):
    module = of("0.15", 3, install, 8, 4, 3, 5, 2, 1)
    wanted = {"kernel_size": 3, "kernel_size_d": 5, "dilation": 2, "dilation_d": 1}
    wanted |= {"window_size": 6, "window_size_d": 5}
    assert wanted.items() <= vars(module).items()
    assert module.rpb.shape == (4, 9, 5, 5)
    x = tokens(5, 6, 7)
    window = {"kernel_size": (5, 3, 3), "dilation": (1, 2, 2)}
    torch.testing.assert_close(module(x), expected(module, x, **window))
    plain = type(module)(8, 4, 3, dilation=None)
    assert (plain.kernel_size_d, plain.dilation, plain.dilation_d) == (3, 1, 1)
    with pytest.raises(ValueError, match=r"kernel_size=5 .* on axis 0 is 5, .* length 4"):
        module(tokens(4, 6, 7))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_0_17(rank, install):
    module = of("0.17", rank, install, 8, 4, [3] * rank, None, None, True)
    window = ((3,) * rank, (1,) * rank, (False,) * rank)
    assert (module.kernel_size, module.dilation, module.is_causal) == window
    assert not hasattr(module, "stride")
    assert (module.attn_drop_rate, module.use_experimental_ops) == (0.0, False)
    x = tokens(*SIZES[:rank])
    torch.testing.assert_close(module(x), expected(module, x, 3))
    kind = type(module)
    plain = kind(8, 4, 3, 2, True, use_experimental_ops=True, attn_drop=0.5)
    assert (plain.rpb, plain.is_causal) == (None, (True,) * rank)
    assert plain.use_experimental_ops
    with pytest.raises(
        ValueError, match=r"kernel_size=3 times dilation=2 on axis 0 is 6, which ex"
    ):
        plain(tokens(4, *SIZES[1:rank]).float())


@pytest.mark.parametrize("own", ["0.20", "0.21"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_0_20_and_0_21(own, rank, install):
    module = of(own, rank, install, 8, 4, 3, 2, None, [True] + [False] * (rank - 1))
    window = {"stride": (2,) * rank, "is_causal": (True, False, False)[:rank]}
    assert {"na_dim": rank, "embed_dim": 8, **window}.items() <= vars(module).items()
    shapes = {name: tuple(array.shape) for name, array in module.state_dict().items()}
    assert shapes == LINEAR
    x = tokens(*SIZES[:rank])
    torch.testing.assert_close(module(x), expected(module, x, 3, **window))
    assert isinstance(module, NeighborhoodAttentionGeneric)
    generic = sys.modules["natten.modules"].NeighborhoodAttentionGeneric(rank, 8, 4, 3, None)
    generic.double().load_state_dict(module.state_dict())
    torch.testing.assert_close(generic(x), expected(generic, x, 3))
    with pytest.raises(ValueError, match="na_dim=4 is not 1, 2 or 3"):
        NeighborhoodAttentionGeneric(4, 8, 4, 3)


def test_0_20_0_called_it_dim(install):
    kind = install("0.20").NeighborhoodAttention2D
    assert kind(dim=8, num_heads=4, kernel_size=3, stride=2).stride == (2, 2)


def test_models_that_pass_none_in_any_generation():
    """As the files of NAT's own repository do, which were written for 0.14."""
    given = {"kernel_size": 7, "num_heads": 4, "qkv_bias": True, "qk_scale": None}
    given |= {"dilation": None, "attn_drop": 0.0, "proj_drop": 0.0}
    module = natten.NeighborhoodAttention2D(8, **given)
    assert module(tokens(7, 8).float()).shape == (2, 7, 8, 8)
    early = natten.modules.NeighborhoodAttention(8, 7, 4, dilation=None)  # up to 0.14.4
    assert (early.kernel_size, early.num_heads, early.window_size) == (7, 4, 7)
    assert early.rpb.shape == (4, 13, 13)


def test_without_a_generation_a_module_is_of_the_newest_that_accepts_it():
    kind = natten.NeighborhoodAttention2D
    assert kind(8, 4, 3).na_dim == 2
    assert kind(dim=8, num_heads=4, kernel_size=3, attn_drop=0.1).kernel_size == (3, 3)
    assert kind(dim=8, num_heads=4, kernel_size=3, bias=True).window_size == 3
    old = kind(dim=8, num_heads=4, kernel_size=3, rel_pos_bias=True, qk_scale=0)
    new = cuneigh.torch.NeighborhoodAttention2D(8, 4, 3, rel_pos_bias=True)
    new.load_state_dict(old.state_dict())
    x = torch.randn(1, 6, 7, 8)
    assert torch.equal(old(x), new(x))
    with pytest.raises(TypeError, match="dim and embed_dim are one argument"):
        kind(embed_dim=8, dim=8, num_heads=4, kernel_size=3)


# Padding


@pytest.mark.parametrize("own", ["0.14", "0.15"])
@pytest.mark.parametrize("lengths", [(4,), (4, 8), (8, 3), (2, 2), (6, 6)])
def test_maps_smaller_than_the_window_are_padded(own, lengths, install):
    """With zeros behind them, before the first projection, so that padded keys have its bias."""
    module = of(own, len(lengths), install, 8, 4, 3, 2)
    x = tokens(*lengths).requires_grad_()
    longer = x.new_zeros(2, *(max(length, 6) for length in lengths), 8)
    inside = (slice(None), *map(slice, lengths))
    longer[inside] = x
    wanted = expected(module, longer, 3, dilation=2)[inside]
    torch.testing.assert_close(module(x), wanted)
    inputs = [x, *module.parameters()]
    got = torch.autograd.grad(module(x).sin().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(wanted.sin().sum(), inputs))


def test_padding_of_three_axes_leaves_the_first_alone(install):
    """As 0.15 does, so that a short first axis is an error there, too."""
    module = of("0.15", 3, install, 8, 4, 3)
    assert module(tokens(3, 2, 2)).shape == (2, 3, 2, 2, 8)
    with pytest.raises(ValueError, match="on axis 0 is 3, which exceeds that axis's length 2"):
        module(tokens(2, 2, 2))


# Pickles


def pickled(module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("own", ["0.14", "0.15", "0.17", "0.21"])
def test_whole_modules_are_pickled(own, install):
    module = of(own, 2, install, 8, 4, 3)
    loaded = torch.load(pickled(nn.Sequential(module)), weights_only=False)
    x = tokens(6, 7)
    assert torch.equal(loaded[0](x), module(x))
    assert vars(loaded[0]).keys() == vars(module).keys()


NEW = {"na_dim": 2, "embed_dim": 8, "expected_input_tensor_rank": 4}
NEW |= {"kernel_size": (3, 3), "stride": (2, 1), "dilation": (1, 1), "is_causal": (True, False)}
OLD = {"kernel_size": 3, "dilation": 1, "window_size": 3}


@pytest.mark.parametrize(
    ("where", "attributes", "window"),
    [
        ("modules", NEW, {"stride": (2, 1), "is_causal": (True, False)}),
        ("natten2d", OLD | {"attn_drop": nn.Dropout(0.0)}, {}),
    ],
)
def test_pickles_of_natten_itself(where, attributes, window, install, monkeypatch):
    """Of its module's names and attributes, which lack what cuneigh's have more."""
    theirs = types.ModuleType(f"natten.{where}")
    kind = type("NeighborhoodAttention2D", (nn.Module,), {"__module__": theirs.__name__})
    theirs.NeighborhoodAttention2D = kind
    module = kind()
    attributes = attributes | {"num_heads": 4, "head_dim": 2, "scale": 0.5}
    attributes |= {"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8), "proj_drop": nn.Dropout(0.0)}
    if where == "natten2d":
        attributes["rpb"] = nn.Parameter(torch.randn(4, 5, 5))
    for name, value in attributes.items():
        setattr(module, name, value)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "natten", types.ModuleType("natten"))
        patch.setitem(sys.modules, theirs.__name__, theirs)
        file = pickled(module.double())
    install()
    loaded = torch.load(file, weights_only=False)
    x = tokens(6, 7)
    torch.testing.assert_close(loaded(x), expected(loaded, x, 3, **window))
    assert type(loaded) is natten.NeighborhoodAttention2D
