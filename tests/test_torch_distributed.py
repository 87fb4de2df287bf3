"""Layouts in shards over several processes, with gloo and NCCL, against one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = {
    "rank_suites.plain": (2, 4),
    "rank_suites.dtensor": (2, 4),
    "rank_suites.compiled": (2,),
    "rank_suites.modules": (2,),
    "rank_errors.errors": (2, 4),
    "uneven.uneven": (2,),
}
"""Of `helpers`, with how many ranks each runs."""


ON_GPUS = (
    *("rank_suites.plain", "rank_suites.halves", "rank_suites.dtensor", "rank_suites.compiled"),
    *("rank_suites.modules", "rank_errors.errors"),
)
"""Those that two GPUs run."""


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
def test_ranks_compute_what_one_process_does(tmp_path):
    """All in one process that forks the ranks, for PyTorch takes seconds to be imported."""
    suites = [(suite, str(world)) for suite, worlds in SUITES.items() for world in worlds]
    run("gloo", tmp_path, sum(suites, ()))


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.parametrize("suite", ON_GPUS)
def test_two_gpus_compute_what_one_does(suite, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    run("nccl", tmp_path, (suite, "2"))


@pytest.mark.skipif(
    not importlib.util.find_spec("physicsnemo"),
    reason="physicsnemo is not installed: pip install nvidia-physicsnemo==2.2.*, 6 GB",
)
def test_shard_tensors_of_physicsnemo(tmp_path):
    suite = "shard_tensors.shard_tensors"
    run("gloo", tmp_path, (suite, "2", suite, "4"))


def run(backend: str, folder: Path, suites: tuple[str, ...]) -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "helpers.ranks", str(folder), backend, *suites],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
