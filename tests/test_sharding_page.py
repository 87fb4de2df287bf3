"""What docs/sharding.md shows is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import cuneigh

PAGE = (Path(__file__).resolve().parents[1] / "docs/sharding.md").read_text(encoding="utf-8")
TORCH, JAX, TILED, DASK = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def run(code: str) -> dict:
    names: dict = {}
    exec(compile(code, "sharding.md", "exec"), names)
    return names


def test_pytorch_on_one_rank(tmp_path):
    torch = pytest.importorskip("torch")
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        names = run(TORCH)
    finally:
        dist.destroy_process_group()
    wanted = cuneigh.na2d(names["query"], names["key"], names["value"], 7)
    torch.testing.assert_close(names["output"], wanted)


def test_jax_on_one_device():
    pytest.importorskip("jax")
    names = run(JAX)
    wanted = cuneigh.na2d(names["query"], names["key"], names["value"], 7)
    np.testing.assert_allclose(names["output"], wanted, 1e-5, 1e-5)


def test_tiles():
    names = run(TILED)
    wanted = cuneigh.na3d(*names["volume"], 5, border=("cut", "cut", "wrap"))
    np.testing.assert_allclose(names["output"], wanted, 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "chunks", "parameters"),
    [
        ((23,), (7,), {"kernel_size": 4, "dilation": 2}),
        ((23,), (3,), {"kernel_size": 5, "stride": 3, "is_causal": True}),
        ((12, 9), (5, 4), {"kernel_size": (3, 4), "border": "cut"}),
        ((5, 6, 8), (5, 2, 8), {"kernel_size": 5, "stride": (1, 5, 2)}),
    ],
)
def test_dask(tokens, chunks, parameters):
    da = pytest.importorskip("dask.array")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, *tokens, heads, 3)) for heads in (4, 2, 2)]
    given = [da.from_array(array, chunks=(1, *chunks, -1, -1)) for array in arrays]
    got = run(DASK)["neighborhood_attention"](*given, **parameters)
    call = (cuneigh.na1d, cuneigh.na2d, cuneigh.na3d)[len(tokens) - 1]
    np.testing.assert_allclose(got, call(*arrays, **parameters), 1e-9, 1e-9)
