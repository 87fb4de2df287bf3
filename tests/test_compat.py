"""NATTEN's names: the same results as cuneigh's, and a real client that runs on them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import cuneigh

torch = pytest.importorskip("torch")

from helpers.generations import choosing, installing  # noqa: E402, F401 - fixtures

from cuneigh.compat import natten as compat  # noqa: E402
from cuneigh.compat.natten import _dinat, _switch, functional  # noqa: E402

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
    function = getattr(compat, f"na{rank}d")
    own = getattr(cuneigh, f"na{rank}d")
    window = {"kernel_size": 3, "stride": 2, "is_causal": True}
    given = {**window, "additional_keys": extra, "additional_values": extra}
    tuning = {"backend": "cutlass-fna", "q_tile_shape": (8,) * rank, "torch_compile": True}
    tuning |= {"attention_kwargs": {"backend": "flex-fmha"}, "run_persistent_kernel": False}
    assert torch.equal(
        function(query, key, value, **given, **tuning), own(query, key, value, **given)
    )
    scaled = function(query, key, value, **given, scale=0.5)
    assert torch.equal(scaled, own(query, key, value, **given, scale=0.5))
    for scale in (None, 0, 0.0):  # which all stand for the default
        assert torch.equal(
            function(query, key, value, 3, is_causal=None, scale=scale), own(query, key, value, 3)
        )
    with_bias = function(query, key, value, 3, rpb=bias(rank))
    assert torch.equal(with_bias, own(query, key, value, 3, rpb=bias(rank)))
    generic = functional.neighborhood_attention_generic
    assert torch.equal(generic(query, key, value, **given), own(query, key, value, **given))


def test_dense_attention():
    query, key, value = arrays(1)
    for is_causal in (False, True):
        output, lse = compat.attention(
            query, key, value, is_causal, 0.5, backend="cutlass-fmha", return_lse=True
        )
        own = cuneigh.attention(query, key, value, is_causal, 0.5, return_lse=True)
        assert torch.equal(output, own[0])
        assert torch.equal(lse, own[1])


@pytest.mark.parametrize(
    "name",
    ["seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q"],
)
def test_what_changes_the_result_and_is_not_there_is_refused(name):
    query, key, value = arrays(1)
    assert compat.attention(query, key, value, **{name: None}).shape == query.shape
    with pytest.raises(NotImplementedError, match=rf"natten\.attention: {name} has no counterpart"):
        compat.attention(query, key, value, **{name: torch.tensor([4, 5])})
    with pytest.raises(
        NotImplementedError, match=r"natten\.na1d: varlen_layout has no counterpart"
    ):
        compat.na1d(query, key, value, 3, varlen_layout=object())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_heads_first(rank):
    query, key, value = arrays(rank, heads_first=True)
    extra = torch.randn(2, 3, 4, 8)
    qk, av = (getattr(compat, f"na{rank}d_{half}") for half in ("qk", "av"))
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
    old = functional
    qk, qkrpb, av = (getattr(old, f"natten{rank}d{name}") for name in ("qk", "qkrpb", "av"))
    new_qk, new_av = getattr(old, f"na{rank}d_qk"), getattr(old, f"na{rank}d_av")
    assert torch.equal(qk(query, key, 3, 2), new_qk(query, key, 3, 2))
    logits = qkrpb(query, key, bias(rank), 3, 2)
    assert torch.equal(logits, new_qk(query, key, 3, 2, rpb=bias(rank)))
    assert torch.equal(av(logits, value, 3, 2), new_av(logits, value, 3, 2))


def test_the_oldest_names_in_three_dimensions():
    query, key, value = arrays(3, heads_first=True)
    old, sizes, dilations = functional, (2, 3, 3), (2, 1, 1)
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
    logits = functional.natten2dqkrpb(query, key, rpb, 3, 2)
    functional.natten2dav(logits.softmax(-1), value, 3, 2).sum().backward()
    compat.na2d(query, key, value, 3).sum().backward()
    assert all(tensor.grad is not None for tensor in (query, key, value, rpb))


def test_everything_is_offered():
    for name in compat.__all__:
        assert hasattr(compat, name)
    for name in functional.__all__:
        function = getattr(functional, name)
        assert function.__name__ == name
        assert not inspect.isclass(function)


# Installation


def test_installation(install):
    assert importlib.util.find_spec("natten") is None
    installed = install()
    assert install() is installed
    import natten.functional
    import natten.na2d
    from natten import NeighborhoodAttention2D, na2d
    from natten.functional import na1d_qk, natten2dav, natten2dqkrpb
    from natten.natten2d import NeighborhoodAttention2D as Old

    assert Old is NeighborhoodAttention2D is compat.NeighborhoodAttention2D
    assert natten.na2d is na2d is compat.na2d
    assert (natten2dav, natten2dqkrpb) == (functional.natten2dav, functional.natten2dqkrpb)
    assert na1d_qk is compat.na1d_qk
    assert "na1d" in natten.functional.__all__
    assert importlib.util.find_spec("natten").name == "natten"
    assert importlib.util.find_spec("natten.functional").name == "natten.functional"
    assert importlib.metadata.version("natten") == natten.__version__ == compat.__version__


def test_what_natten_says_of_itself(install):
    """Of models that run with or without fused kernels, and set modes when they are imported."""
    natten = install()
    assert natten.HAS_LIBNATTEN
    assert natten.has_fna()
    assert natten.has_cuda() == torch.cuda.is_available()
    for name in natten.context.__all__:
        assert getattr(natten, name) is getattr(natten.context, name), name
    natten.use_fused_na(False, kv_parallel=True)
    assert not natten.is_fna_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.force_flex_attention()
    assert natten.is_fused_na_enabled()
    assert natten.context.should_force_flex_attention()
    natten.use_fused_na()
    assert not natten.context.should_use_flex_attention()
    assert not natten.disable_gemm_na()
    assert natten.enable_gemm_na()
    natten.use_autotuner(backward_pass=True)
    assert natten.is_autotuner_enabled()
    assert not natten.is_autotuner_enabled_for_forward()
    natten.disable_autotuner()
    assert not natten.is_autotuner_enabled()
    natten.allow_flex_compile(backprop=True)
    assert natten.is_flex_compile_backprop_allowed()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()
    natten.set_memory_usage_preference("unrestricted")
    assert natten.is_memory_usage_unrestricted()
    assert natten.get_memory_usage_preference().name == "Unrestricted"
    with pytest.raises(ValueError, match="pref='some' is not one of default, strict"):
        natten.set_memory_usage_preference("some")
    natten.set_memory_usage_preference()
    assert natten.is_memory_usage_default()


def test_installation_that_comes_too_late_says_so(install, monkeypatch):
    client = types.ModuleType("client")
    client.natten2dav = None
    monkeypatch.setitem(sys.modules, "client", client)
    with pytest.raises(RuntimeError, match=r"too late: client is imported already and has found n"):
        install()
    monkeypatch.setitem(sys.modules, "natten", types.ModuleType("natten"))
    with pytest.raises(
        RuntimeError, match=r"install\(\) comes too late: natten is imported already"
    ):
        install(generation="0.17")
    assert _switch.chosen() is None


# The real client: DiNAT of Hugging Face


@pytest.mark.long
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


@pytest.mark.parametrize("shape", [(1, 2, 5, 7, 4), (1, 7, 5, 2, 4)])
def test_a_release_of_transformers_is_asked_for_its_order_of_axes(shape):
    """4.52 gives [batch, heads, height, width, dim], 4.54 [batch, width, height, heads, dim]."""
    client = types.ModuleType(_dinat.MODULE)

    class Loader:
        def exec_module(self, module):
            class NeighborhoodAttention:
                def __init__(self, *_):
                    pass

                def __call__(self, x):
                    return module.natten2dqkrpb(x.new_empty(shape), None, None, 3, 1)

            module.DinatConfig, module.NeighborhoodAttention = object, NeighborhoodAttention
            module.natten2dqkrpb, module.natten2dav = (
                functional.natten2dqkrpb,
                functional.natten2dav,
            )

    loader = Loader()
    _dinat.prepare(loader)
    loader.exec_module(client)
    is_width_first = shape[1] == 7
    assert (client.natten2dqkrpb is functional.natten2dqkrpb) == (not is_width_first)
    query, weights = torch.randn(1, 6, 9, 6, 8), torch.randn(1, 6, 9, 6, 9)
    given = query.transpose(1, 3) if is_width_first else query
    logits = client.natten2dqkrpb(given, given, None, 3, 1)
    assert torch.equal(logits, functional.natten2dqkrpb(query, query, None, 3, 1))
    output = client.natten2dav(weights, given, 3, 1)
    assert torch.equal(output, functional.natten2dav(weights, query, 3, 1))
