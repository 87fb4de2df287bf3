"""PyTorch: the modules of `cuneigh.torch`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers.tensors import no_compiled_code

import cuneigh

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures(no_compiled_code.__name__)


def modules() -> list[tuple[Any, int, dict[str, Any]]]:
    from cuneigh.torch import (
        NeighborhoodAttention1D,
        NeighborhoodAttention2D,
        NeighborhoodAttention3D,
    )

    strided = {"stride": (1, 2, 1), "is_causal": (True, False, False)}
    return [
        (NeighborhoodAttention1D, 1, {"dilation": 2, "qk_scale": 0.3}),
        (NeighborhoodAttention2D, 2, {"rel_pos_bias": True}),
        (NeighborhoodAttention2D, 2, {"qkv_bias": False, "proj_drop": 0.5}),
        (NeighborhoodAttention3D, 3, strided),
    ]


@pytest.mark.parametrize(("kind", "rank", "arguments"), modules())
def test_modules_compute_what_they_hold(kind, rank, arguments):
    torch.manual_seed(0)
    module = kind(16, 4, 2, **arguments, dtype=torch.float64)
    x = torch.randn(2, *(6, 5, 4)[:rank], 16, dtype=torch.float64)
    module.eval()
    query, key, value = module.qkv(x).reshape(*x.shape[:-1], 3, 4, 4).unbind(-3)
    window = {
        name: arguments[name] for name in ("dilation", "stride", "is_causal") if name in arguments
    }
    whole = getattr(cuneigh, f"na{rank}d")
    scale = arguments.get("qk_scale")
    output = whole(query, key, value, 2, **window, scale=scale, rpb=module.rpb)
    assert torch.equal(module(x), module.proj(output.reshape(x.shape)))
    names = {"qkv.weight", "proj.weight", "proj.bias"}
    names |= {"qkv.bias"} if arguments.get("qkv_bias", True) else set()
    names |= {"rpb"} if "rel_pos_bias" in arguments else set()
    assert set(module.state_dict()) == names
    assert "kernel_size=(2" in repr(module)
    module.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_dropout_of_weights():
    from cuneigh.torch import NeighborhoodAttention2D

    torch.manual_seed(0)
    module = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True, attn_drop=0.5)
    x = torch.randn(2, 6, 5, 16)
    module.train()
    assert not torch.allclose(module(x), module(x))
    module.eval()
    plain = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))
    module.train()
    module.attn_drop.p = 1e-12  # nothing is dropped, but the halves compute
    torch.testing.assert_close(module(x), plain(x))


def test_modules_compile_and_are_copied():
    from cuneigh.torch import NeighborhoodAttention2D

    module = NeighborhoodAttention2D(16, 4, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 5, 16)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    half = copy.deepcopy(module).half()
    assert half(x.half()).dtype == torch.float16


def test_modules_refuse_what_makes_no_sense():
    from cuneigh.torch import NeighborhoodAttention2D

    with pytest.raises(ValueError, match="embed_dim=10 is not a multiple of num_heads=4"):
        NeighborhoodAttention2D(10, 4, 3)
    with pytest.raises(ValueError, match="rel_pos_bias=True needs stride=1"):
        NeighborhoodAttention2D(16, 4, 3, stride=2, rel_pos_bias=True)
    with pytest.raises(ValueError, match=r"NeighborhoodAttention2D: kernel_size=.* has 3 entries"):
        NeighborhoodAttention2D(16, 4, (3, 3, 3))
    with pytest.raises(ValueError, match=r"x has shape \(2, 6, 16\), but \[batch, X1, X2, 16\]"):
        NeighborhoodAttention2D(16, 4, 3)(torch.zeros(2, 6, 16))
