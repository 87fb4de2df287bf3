"""Tuning: plans are tried, the fastest is kept in a file, and later calls take it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cuneigh import _call, _programs
from cuneigh._backends import choose, fused, hopper, naive
from cuneigh._gpu import kept, tuned
from cuneigh._measure.cases import problem_of
from cuneigh.cli import main
from cuneigh.cli.devices import device_of
from cuneigh.cli.profile.tune import Tuner, tune

H100 = device_of("sm_90")
PROBLEM = problem_of(
    {"tokens": [20, 24], "heads": 4, "dim": 64, "kernel": 7, "batch": 32}, "float16"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUNEIGH_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned.json"


def planned(problem: Any) -> tuple[str, dict[str, str]]:
    """What a call takes: the backend, and the text of its plan of each pass."""
    _call.forget()
    backend = choose(problem, H100, None).NAME
    plans = _programs.rehearse(problem, H100, None)[1]
    return backend, {each.pass_: repr(each.plan) for each in plans}


def entry_of(plans: Mapping[str, Any], backend: str = "fused") -> tuned.Entry:
    return tuned.Entry(backend, {name: repr(plan) for name, plan in plans.items()}, 1.0, 1.5)


def test_plans_to_try_begin_with_the_planners_and_differ() -> None:
    for problem in (PROBLEM, PROBLEM.gradient):
        for pass_, plans in fused.plans(problem, H100).items():
            assert len(plans) > 5
            assert len(set(plans)) == len(set(map(repr, plans))) == len(plans)
            with tuned.forcing({}):
                _, own = _programs.rehearse(problem, H100, "fused")
            assert repr(plans[0]) == {each.pass_: repr(each.plan) for each in own}[pass_]


@pytest.mark.parametrize("problem", [PROBLEM, PROBLEM.gradient], ids=["forward", "backward"])
def test_a_kept_plan_is_taken(problem: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    before = planned(problem)
    others = {pass_: plans[-1] for pass_, plans in fused.plans(problem, H100).items()}
    tuned.store(problem, H100, entry_of(others))
    after = planned(problem)
    assert after == ("fused", {name: repr(plan) for name, plan in others.items()}) != before
    monkeypatch.setenv("CUNEIGH_TUNED", "0")
    assert planned(problem) == before
    monkeypatch.delenv("CUNEIGH_TUNED")
    assert planned(replace(problem, batch=2))[1] != after[1], "another problem"
    assert tuned.find(problem, replace(H100, name="another GPU")) is None


def test_another_backend_can_be_kept() -> None:
    large = problem_of({"tokens": [8192], "heads": 8, "dim": 128, "kernel": 2048}, "float16")
    assert planned(large)[0] == "hopper"
    tuned.store(large, H100, tuned.Entry("gemm", {}, 1.0, 2.0))
    assert planned(large)[0] == "gemm"
    tuned.store(large, H100, tuned.Entry("none such", {}, 1.0, 2.0))
    assert planned(large)[0] == "hopper", "the planner's, where there is no such backend"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(kept.version(), "older"),
        lambda text: "[]",
        lambda text: text.replace('"backend"', '"back"'),
        lambda text: text.replace("FusedPlan(", "Plan(").replace("SmallPlan(", "Plan("),
        lambda text: json.dumps({"version": kept.version(), "gpus": []}),
        lambda text: text.replace('"plans": {', '"plans": "", "other": {'),
    ],
)
def test_what_is_stale_or_damaged_counts_as_absent(damage: Any, cache: Path) -> None:
    before = planned(PROBLEM)
    other = {"forward": fused.plans(PROBLEM, H100)["forward"][-1]}
    tuned.store(PROBLEM, H100, entry_of(other))
    cache.write_text(damage(cache.read_text()))
    tuned._entries.cache_clear()
    assert planned(PROBLEM)[1] == before[1]
    tuned.store(PROBLEM, H100, entry_of(other))  # and is replaced
    assert planned(PROBLEM)[1] != before[1]


def test_tuning_keeps_what_is_fastest(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """With times that are made up: of each pass the third plan is the best."""
    best = {
        pass_: plans[2]
        for operation in (PROBLEM, PROBLEM.gradient)
        for pass_, plans in fused.plans(operation, H100).items()
    }
    forced: list[Any] = []

    def time(self: Tuner, backend: Any, plans: Mapping[str, Any]) -> float:
        forced.append((backend.NAME, dict(plans)))
        if backend.NAME != "fused":
            return 3.0
        if (
            len(plans) == 1
            and next(iter(plans.values()))
            is fused.plans(self.operation, H100)[next(iter(plans))][1]
        ):
            raise ZeroDivisionError("broken")
        return 2.0 - sum(plans.get(pass_) == plan for pass_, plan in best.items()) / 4

    monkeypatch.setattr(Tuner, "_time", time)
    rows = tune(PROBLEM, np, H100, backward=True, budget_ms=1.0)
    assert [row["operation"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["backend"] == "fused"
        assert row["plans"] == {name: repr(best[name]) for name in row["plans"]}
        assert len(row["plans"]) == (1 if row["operation"] == "forward" else 2)
        assert row["tuned_ms"] == 2.0 - len(row["plans"]) / 4
        assert any("ZeroDivisionError: broken" in each for each in row["failed"])
        assert row["gain"] > 0
    assert planned(PROBLEM) == ("fused", rows[0]["plans"])
    assert planned(PROBLEM.gradient) == ("fused", rows[1]["plans"])
    document = json.loads(cache.read_text())
    assert document["version"] == kept.version()
    assert list(document["gpus"]) == [f"{H100.name}, 132 SMs"]


def test_what_is_hardly_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tuner, "_time", lambda self, backend, plans: 1.0 - 0.005 * len(plans))
    (row,) = tune(PROBLEM, np, H100, backward=False, budget_ms=1.0)
    assert row["plans"] == {}
    assert row["gain"] == 0


def test_backends_without_plans_of_their_own_are_tried_as_they_are() -> None:
    tuner = Tuner(PROBLEM, PROBLEM, np, H100, 1.0)
    tuner.backends = [naive, hopper]
    tried = [(backend, plans) for backend, plans in tuner.trials()]
    assert tried.count((naive, {})) == tried.count((hopper, {})) == 1
    assert [backend for backend, plans in tried if plans] == [hopper] * 7
    assert tuner.count() == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tune", "--tune is for GPUs, of which there is none here"),
        ("--tune --dry-run", "--tune measures all backends, which --dry-run does not allow"),
        ("--tune --backend cpu", "--tune measures all backends, which --backend does not allow"),
    ],
)
def test_bad_options(
    options: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from cuneigh._device import CPU
    from cuneigh._measure import arrays

    monkeypatch.setattr(arrays, "here", lambda: (np, CPU))
    assert main(["profile", "-i", "9", *options.split()]) == 2
    assert message in capsys.readouterr().err
