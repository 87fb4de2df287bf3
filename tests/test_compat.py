"""NATTEN's names: the same results as cuneigh's, and a real client that runs on them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import cuneigh

torch = pytest.importorskip("torch")

from cuneigh.compat import natten  # noqa: E402

CLIENT = Path(__file__).parent / "helpers" / "dinat_client.py"
SIZES = {1: (9,), 2: (6, 7), 3: (4, 5, 6)}


def arrays(rank: int, *, heads_first: bool = False, count: int = 3) -> list:
    shape = (2, 3, *SIZES[rank], 8) if heads_first else (2, *SIZES[rank], 3, 8)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def bias(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *[5] * rank, generator=generator)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_newest_names(rank):
    query, key, value = arrays(rank)
    extra = torch.randn(2, 4, 3, 8)
    function = getattr(natten, f"na{rank}d")
    own = getattr(cuneigh, f"na{rank}d")
    window = {"kernel_size": 3, "stride": 2, "is_causal": True}
    given = {**window, "additional_keys": extra, "additional_values": extra}
    tuning = {"backend": "cutlass-fna", "q_tile_shape": (8,) * rank, "torch_compile": True}
    tuning |= {"attention_kwargs": {"backend": "flex-fmha"}, "run_persistent_kernel": False}
    assert torch.equal(
        function(query, key, value, **given, **tuning), own(query, key, value, **given)
    )
    positional = function(query, key, value, 3, 2, 1, True, 0.5, extra, extra)
    assert torch.equal(positional, own(query, key, value, **given, scale=0.5))
    for scale in (None, 0, 0.0):  # which all stand for the default
        assert torch.equal(
            function(query, key, value, 3, is_causal=None, scale=scale), own(query, key, value, 3)
        )
    with_bias = function(query, key, value, 3, rpb=bias(rank))
    assert torch.equal(with_bias, own(query, key, value, 3, rpb=bias(rank)))
    generic = natten.functional.neighborhood_attention_generic
    assert torch.equal(generic(query, key, value, **given), own(query, key, value, **given))


def test_dense_attention_and_merging():
    query, key, value = arrays(1)
    for is_causal in (False, True):
        output, lse = natten.attention(
            query, key, value, is_causal, 0.5, backend="cutlass-fmha", return_lse=True
        )
        own = cuneigh.attention(query, key, value, is_causal, 0.5, return_lse=True)
        assert torch.equal(output, own[0])
        assert torch.equal(lse, own[1])
    merged = natten.merge_attentions([output, output], [lse, lse], torch_compile=False)
    assert torch.equal(merged, cuneigh.merge_attentions([output, output], [lse, lse])[0])


@pytest.mark.parametrize(
    "name",
    ["seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q"],
)
def test_what_changes_the_result_and_is_not_there_is_refused(name):
    query, key, value = arrays(1)
    assert natten.attention(query, key, value, **{name: None}).shape == query.shape
    with pytest.raises(NotImplementedError, match=rf"natten\.attention: {name} has no counterpart"):
        natten.attention(query, key, value, **{name: torch.tensor([4, 5])})
    with pytest.raises(
        NotImplementedError, match=r"natten\.na1d: varlen_layout has no counterpart"
    ):
        natten.na1d(query, key, value, 3, varlen_layout=object())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_heads_first(rank):
    query, key, value = arrays(rank, heads_first=True)
    extra = torch.randn(2, 3, 4, 8)
    qk, av = (getattr(natten, f"na{rank}d_{half}") for half in ("qk", "av"))
    logits = qk(query, key, 3, additional_keys=extra, rpb=bias(rank))
    assert logits.shape == (2, 3, *SIZES[rank], 3**rank + 4)
    output = av(logits.softmax(-1), value, 3, additional_values=extra)
    last = [tensor.movedim(1, -2) for tensor in (query, key, value, extra)]
    own = getattr(cuneigh, f"na{rank}d")(
        *last[:3], 3, scale=1.0, additional_keys=last[3], additional_values=last[3], rpb=bias(rank)
    )
    torch.testing.assert_close(output.movedim(1, -2), own)
    causal = av(qk(query, key, 3, is_causal=True).softmax(-1), value, 3, is_causal=True)
    own = getattr(cuneigh, f"na{rank}d")(*last[:3], 3, scale=1.0, is_causal=True)
    torch.testing.assert_close(causal.movedim(1, -2), own)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_oldest_names(rank):
    query, key, value = arrays(rank, heads_first=True)
    old = natten.functional
    qk, qkrpb, av = (getattr(old, f"natten{rank}d{name}") for name in ("qk", "qkrpb", "av"))
    new_qk, new_av = getattr(old, f"na{rank}d_qk"), getattr(old, f"na{rank}d_av")
    assert torch.equal(qk(query, key, 3, 2), new_qk(query, key, 3, 2))
    logits = qkrpb(query, key, bias(rank), 3, 2)
    assert torch.equal(logits, new_qk(query, key, 3, 2, rpb=bias(rank)))
    assert torch.equal(av(logits, value, 3, 2), new_av(logits, value, 3, 2))


@pytest.mark.parametrize("heads", [3, 6])
def test_the_axes_as_transformers_hands_them_over(heads):
    """As many heads as columns, too: then the order in memory tells."""
    rows, columns, old = 7, 6, natten.functional
    tokens = [torch.randn(2, rows, columns, heads, 4) for _ in range(3)]
    rpb = torch.randn(heads, 5, 5)
    first = [array.movedim(-2, 1) for array in tokens]
    odd = [array.transpose(1, 2) for array in tokens]  # batch, columns, rows, heads
    logits = old.natten2dqkrpb(*first[:2], rpb, 3, 2)
    assert torch.equal(old.natten2dqkrpb(*odd[:2], rpb, 3, 2), logits)
    output = old.natten2dav(logits, first[2], 3, 2)
    assert torch.equal(old.natten2dav(logits, odd[2], 3, 2), output)
    dense = [array.contiguous() for array in first]
    assert torch.equal(old.natten2dqkrpb(*dense[:2], rpb, 3, 2), logits)
    assert torch.equal(old.natten2dav(logits, dense[2], 3, 2), output)


def test_the_oldest_names_in_three_dimensions():
    query, key, value = arrays(3, heads_first=True)
    old, sizes, dilations = natten.functional, (2, 3, 3), (2, 1, 1)
    rpb = torch.randn(3, 3, 5, 5)
    logits = old.natten3dqkrpb(query, key, rpb, 2, 3, 2, 1)
    assert torch.equal(logits, old.na3d_qk(query, key, sizes, dilations, rpb=rpb))
    assert torch.equal(
        old.natten3dqk(query, key, 2, 3, 2, 1), old.na3d_qk(query, key, sizes, dilations)
    )
    assert torch.equal(
        old.natten3dav(logits, value, 2, 3, 2, 1), old.na3d_av(logits, value, sizes, dilations)
    )


def test_gradients_flow():
    query, key, value = (t.requires_grad_() for t in arrays(2, heads_first=True))
    rpb = bias(2).requires_grad_()
    logits = natten.functional.natten2dqkrpb(query, key, rpb, 3, 2)
    natten.functional.natten2dav(logits.softmax(-1), value, 3, 2).sum().backward()
    natten.na2d(query, key, value, 3).sum().backward()
    assert all(tensor.grad is not None for tensor in (query, key, value, rpb))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules(rank):
    import cuneigh.torch

    name = f"NeighborhoodAttention{rank}D"
    kind, own = getattr(natten, name), getattr(cuneigh.torch, name)
    module = kind(16, 4, 2, 1, 2, False, False, 0.5, 0.1)
    assert (module.scale, module.proj_drop.p, module.qkv.bias) == (0.5, 0.1, None)
    for old in (
        kind(dim=16, num_heads=4, kernel_size=2, rel_pos_bias=True, qk_scale=0),
        kind(dim=16, num_heads=4, kernel_size=2, bias=True),
    ):
        new = own(16, 4, 2, rel_pos_bias=True)
        new.load_state_dict(old.state_dict())
        x = torch.randn(1, *SIZES[rank], 16)
        assert torch.equal(old(x), new(x))
    with pytest.raises(TypeError, match="dim and embed_dim are one argument"):
        kind(embed_dim=16, dim=16, num_heads=4, kernel_size=2)


def test_everything_is_offered():
    for name in natten.__all__:
        assert hasattr(natten, name)
    for name in natten.functional.__all__:
        function = getattr(natten.functional, name)
        assert function.__name__ == name
        assert not inspect.isclass(function)


# Installation


def test_installation():
    """In a process of its own, one for all steps: PyTorch and its compiler take long to import."""
    code = LATE + INSTALL + MODES
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# After what makes an installation come too late, which changes nothing
LATE = """
import importlib.util, sys, types
import cuneigh.compat.natten

client = types.ModuleType("client")
client.natten2dav = None
for module, words in (
    (types.ModuleType("natten"), "natten is imported already"),
    (client, "client is imported already and has found no natten"),
):
    sys.modules[module.__name__] = module
    try:
        cuneigh.compat.natten.install()
    except RuntimeError as error:
        assert "install() comes too late" in str(error) and words in str(error), error
    else:
        raise AssertionError(words)
    del sys.modules[module.__name__]
    assert importlib.util.find_spec("natten") is None
"""

INSTALL = """
cuneigh.compat.natten.install()
cuneigh.compat.natten.install()
import natten, natten.functional, natten.na2d
from natten import NeighborhoodAttention2D, na2d
from natten.functional import natten2dav, natten2dqkrpb, na1d_qk
from natten.natten2d import NeighborhoodAttention2D as Old
assert Old is NeighborhoodAttention2D
assert importlib.util.find_spec("natten").name == "natten"
assert importlib.util.find_spec("natten.functional").name == "natten.functional"
import importlib.metadata
assert importlib.metadata.version("natten") == natten.__version__
assert natten.__version__ == cuneigh.compat.natten.__version__
assert natten.na2d is na2d is cuneigh.compat.natten.na2d
"""

# What NATTEN says of itself to models that run with or without fused kernels, and the modes that
# they set when they are imported
MODES = """
import natten.context, torch
assert natten.HAS_LIBNATTEN and natten.has_fna() and natten.has_cuda() == torch.cuda.is_available()
for name in natten.context.__all__:
    assert getattr(natten, name) is getattr(natten.context, name), name
natten.use_fused_na(False, kv_parallel=True)
assert not natten.is_fna_enabled()
natten.use_fused_na()
assert natten.is_fused_na_enabled()
natten.use_autotuner(backward_pass=True)
assert natten.is_autotuner_enabled()
natten.disable_autotuner()
assert not natten.is_autotuner_enabled()
natten.set_memory_usage_preference("unrestricted")
assert natten.is_memory_usage_unrestricted() and not natten.is_memory_usage_default()
try:
    natten.set_memory_usage_preference("some")
except ValueError as error:
    assert "pref='some' is not one of default, strict" in str(error)
else:
    raise AssertionError
query, key, value = torch.randn(3, 1, 8, 8, 2, 16).unbind()
assert natten.has_fused_na()
output = natten.functional.na2d(query, key, value, 7, scale=1.0)
assert torch.equal(output, cuneigh.na2d(query, key, value, 7, scale=1.0))
"""


# The real client: DiNAT of Hugging Face


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dinat_runs_unmodified(device):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(CLIENT), device],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
