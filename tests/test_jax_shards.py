"""JAX arrays over several devices: what is gathered, and what results are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="JAX is not installed")
@pytest.mark.parametrize(
    "platform",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.multi_gpu])],
)
def test_arrays_over_several_devices(platform):
    if platform == "cuda":
        import cupy

        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("there is only one GPU")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.jax_shards", platform],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
