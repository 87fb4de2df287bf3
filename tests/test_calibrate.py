"""Cost models fitted to a GPU: what they are made of, the fit, and what is kept of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cuneigh import _call, _jit, _programs
from cuneigh._backends import choose, fused, gemm, hopper, naive
from cuneigh._device import CPU, Device
from cuneigh._gpu import kept, rates
from cuneigh._gpu.linear import Linear, Speed, leaves, linear, replaced
from cuneigh._measure import arrays
from cuneigh._measure.cases import problem_of
from cuneigh._measure.fit import Measured, fit, times_of
from cuneigh._problem import Problem
from cuneigh.cli import main
from cuneigh.cli.profile import calibrate

BENCH = Path(__file__).parents[1] / "bench"
H200 = Device("cuda", 0, "NVIDIA H200", (9, 0), 132, 227 * 1024, 139 << 30)
H100 = replace(H200, name="NVIDIA H100", memory=80 << 30)
FITTED = (hopper, fused, naive, gemm)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path))
    return tmp_path / "rates.json"


# Models and their linear form


def planned(backend: Any, problem: Problem) -> dict[str, Any]:
    return {each.pass_: each.plan for each in _programs.rehearse(problem, H100, backend.NAME)[1]}


@pytest.mark.parametrize("backend", FITTED, ids=lambda backend: backend.NAME)
def test_a_model_is_what_predicts_and_is_linear(backend: Any) -> None:
    of = {
        "small": {"tokens": [20, 24], "heads": 4, "dim": 64, "kernel": 7, "batch": 32},
        "long": {"tokens": [8192], "heads": 8, "dim": 128, "kernel": 2048},
    }
    for problem in (problem_of(entry, "float16") for entry in of.values()):
        for operation in (problem, problem.gradient):
            plans = planned(backend, operation)
            ms = backend.model(operation, H100, plans, backend.RATES)
            assert ms == backend.predicted_ms(operation, H100)
            form = backend.model(operation, H100, plans, linear(backend.RATES))
            assert form.value == pytest.approx(ms, rel=1e-12)
            times = times_of(backend.RATES)
            total = sum(amount * times[path] for path, amount in form.terms.items())
            assert total == pytest.approx(ms, rel=1e-12)


def test_what_is_of_no_rate_cannot_be_part_of_a_prediction() -> None:
    with pytest.raises(TypeError, match="2 is part of a prediction, but of no rate"):
        Linear(1.0, {"a": 1.0}) + 2


class Toy(NamedTuple):
    step: float = 1.0
    bytes: Speed = Speed(10)
    unseen: float = 3.0
    nothing: float = 0.0


def toy(steps: float, moved: float) -> Any:
    """Of two things at a time the one that takes longer, and something more."""
    return lambda rates: max(steps * rates.step, moved / rates.bytes) + 2 * rates.nothing


def test_the_greater_of_two_is_fitted() -> None:
    true = Toy(step=4.0, bytes=Speed(2), nothing=1.5)
    sizes = [(1, 30), (2, 3), (5, 40), (7, 7), (9, 100), (4, 2), (30, 20), (3, 60)]
    measured = [Measured(model, model(true)) for model in (toy(*each) for each in sizes)]
    found, seen = fit(measured, Toy())
    assert leaves(found) == pytest.approx({**leaves(true), "unseen": found.unseen}, rel=0.02)
    assert isinstance(found.bytes, Speed)
    assert 6 < found.unseen < 18, "as much slower as the others"
    assert seen == {"step", "bytes", "nothing"}


# Calibration


def chip_of(backend: Any, seed: int) -> Any:
    """Rates of a chip on which everything takes 0.7 to 1.6 times as long."""
    rng = random.Random(f"{backend.NAME} {seed}")
    factor = {path: rng.uniform(0.7, 1.6) for path in leaves(backend.RATES)}
    return replaced(
        backend.RATES,
        {
            path: rate / factor[path] if isinstance(rate, Speed) else rate * factor[path]
            for path, rate in leaves(backend.RATES).items()
        },
    )


MAIN = {
    "hopper": ["walks.middle.product", "launch_ms"],
    "fused": ["walks.half_forward.product", "walks.float32.product", "small.backward.product"],
    "naive": ["half.forward", "half.backward", "float32.forward"],
    "gemm": ["results.memory_bytes", "results.float32_flops", "gradients.memory_bytes"],
}
"""Rates that a good part of many times is made of."""


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A chip in place of a GPU, by the name of the backend, and a few problems."""
    made = {backend.NAME: chip_of(backend, 0) for backend in FITTED}
    monkeypatch.setattr(calibrate, "measure", lambda trial: trial.model(made[trial.backend.NAME]))
    monkeypatch.setattr(_jit, "precompile", lambda kernels, archs: {})
    few = [each for each in calibrate.CASES if each["dtype"] != "float64"][::3]
    monkeypatch.setattr(calibrate, "CASES", tuple(few))
    return made


def test_the_rates_of_a_chip_are_found_and_taken(
    chip: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cache: Path,
) -> None:
    case = calibrate.CASES[0]
    problem = problem_of(case, case["dtype"])
    before = {backend.NAME: backend.predicted_ms(problem, H100) for backend in FITTED}
    monkeypatch.setattr(arrays, "here", lambda: (np, H100))
    assert main(["profile", "--calibrate", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["failed"] == []
    assert made["device"] == H100.name
    for row in made["backends"]:
        assert row["error_after"] < 0.01 < row["error_before"]
        true = leaves(chip[row["name"]])
        assert row["rates"].keys() == true.keys()
        weighty = MAIN[row["name"]]
        found = [row["rates"][path]["fitted"] for path in weighty]
        assert found == pytest.approx([true[path] for path in weighty], rel=0.15)
    assert made["choices"]["after"]["mean"] <= made["choices"]["before"]["mean"]
    assert made["choices"]["after"]["mean"] < 0.002
    for backend in FITTED:
        now = backend.predicted_ms(problem, H100)
        plans = planned(backend, problem)
        ms = backend.model(problem, H100, plans, chip[backend.NAME])
        assert now == pytest.approx(ms, rel=0.05)
        assert backend.predicted_ms(problem, H200) == before[backend.NAME] != now
    monkeypatch.setenv("CUNEIGH_TUNED", "0")
    assert {backend.NAME: backend.predicted_ms(problem, H100) for backend in FITTED} == before
    monkeypatch.delenv("CUNEIGH_TUNED")
    document = json.loads(cache.read_text())
    assert list(document["gpus"]) == ["NVIDIA H100, 132 SMs"]


def test_a_call_that_fails_is_left_out(
    chip: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "CASES", calibrate.CASES[:2])
    monkeypatch.setattr(arrays, "here", lambda: (np, H100))
    right = calibrate.measure

    def measure(trial: calibrate.Trial) -> float:
        if trial.backend is gemm:
            raise ZeroDivisionError("broken")
        return right(trial)

    monkeypatch.setattr(calibrate, "measure", measure)
    assert main(["profile", "--calibrate"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("NVIDIA H100: ")
    assert "ZeroDivisionError: broken" in printed
    assert "\nfused" in printed
    assert "gemm results" not in printed
    assert rates.of(gemm.NAME, H100, gemm.RATES) is gemm.RATES
    monkeypatch.setattr(calibrate, "SECONDS", -1.0)
    assert main(["profile", "--calibrate"]) == 2
    assert "nothing could be measured" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_gpu_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "CASES", calibrate.CASES[12:15])
    monkeypatch.setattr(calibrate, "ALTERNATIVES", 1)
    assert main(["profile", "--calibrate", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["failed"] == []
    for row in made["backends"]:
        assert row["error_after"] <= row["error_before"] + 0.01, row["name"]


# What is kept


def faster() -> Any:
    """Rates with which fused is taken where it would not be."""
    values = {
        path: rate * 1e6 if isinstance(rate, Speed) else rate / 1e6
        for path, rate in leaves(fused.RATES).items()
    }
    return replaced(fused.RATES, values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(kept.version(), "older"),
        lambda text: json.dumps({"version": kept.version(), "gpus": {"NVIDIA H100, 132 SMs": 1}}),
        lambda text: text.replace('"launch_ms"', '"launch"'),
        lambda text: text.replace('"default"', '"other"'),
        lambda text: text.replace('"small.bytes": 17', '"small.bytes": 18'),
        lambda text: text.replace('"small.bytes": 17000000.0', '"small.bytes": 0'),
        lambda text: text.replace('"small.bytes": 17000000.0', '"small.bytes": "many"'),
    ],
)
def test_what_is_stale_or_damaged_counts_as_absent(damage: Any, cache: Path) -> None:
    long = problem_of({"tokens": [8192], "heads": 8, "dim": 128, "kernel": 2048}, "float16")
    _call.forget()
    assert choose(long, H100, None) is hopper
    rates.store(H100, {"fused": faster()}, {"fused": fused.RATES})
    _call.forget()
    assert choose(long, H100, None) is fused
    damaged = damage(cache.read_text())
    assert damaged != cache.read_text()
    cache.write_text(damaged)
    rates.forget()
    _call.forget()
    assert choose(long, H100, None) is hopper
    rates.store(H100, {"fused": faster()}, {"fused": fused.RATES})  # and is replaced
    _call.forget()
    assert choose(long, H100, None) is fused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--calibrate is for GPUs, of which there is none here"),
        ("-i 9", "--calibrate measures problems of its own, without --input-size"),
        ("--tune", "--calibrate measures problems of its own, without --tune"),
        ("--dry-run", "--calibrate measures problems of its own, without --dry-run"),
        ("-w 3", "--calibrate measures problems of its own, without --window-size"),
    ],
)
def test_bad_options(
    options: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(arrays, "here", lambda: (np, CPU))
    assert main(["profile", "--calibrate", *options.split()]) == 2
    assert capsys.readouterr().err == f"python -m cuneigh profile: {message}\n"


def test_without_scipy_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arrays, "here", lambda: (np, H100))
    monkeypatch.setattr("cuneigh.cli.profile.find_spec", lambda name: None)
    assert main(["profile", "--calibrate"]) == 2
    assert "pip install 'cuneigh[calibrate]'" in capsys.readouterr().err
