"""Kernels on the host, whose threads are fibers: parts and masks without a GPU."""

from __future__ import annotations

import platform

import numpy as np
import pytest
from helpers.emulated import Emulator, compiler
from helpers.part_problems import Family, part_problem

from cuneigh._backends import fused, naive

pytestmark = pytest.mark.skipif(
    compiler() is None or (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="needs g++ on x86-64 Linux",
)


@pytest.mark.parametrize(
    ("backend", "family"),
    [(naive, Family("float64", 2, 4, 3)), (fused, Family("float32", 1, 16, 16))],
    ids=["naive", "fused"],
)
def test_parts_and_masks_agree_with_the_oracle(backend, family, tmp_path):
    emulator = Emulator(tmp_path)
    for seed in range(4):
        problem = part_problem(np.random.default_rng(seed), family, "forward", has_mask=True)
        emulator.check(backend, problem, seed)
