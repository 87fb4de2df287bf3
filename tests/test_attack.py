"""The attack on the GPU backends, tried on the cpu backend: its oracle finds what is wrong."""

from __future__ import annotations

import time

import numpy as np
from helpers import attack, attack_hard
from helpers.attack_calls import call, with_forward
from helpers.dense import Dense, wrong


def test_random_problems_agree_with_dense_float64():
    counts, lines = attack.attack_cases(list(range(24)), "cpu", time.time() + 60)
    assert lines == []
    assert counts == {"cpu": 24}


def test_what_is_hard_is_tried():
    for hard in (attack_hard.no_elements, attack_hard.not_finite):
        assert [line for line in hard("cpu") if not line.startswith("!")] == []


def test_values_in_the_wrong_place_are_found():
    found = tried = 0
    for seed in range(12):
        case = attack.case_of(seed)
        name = "value" if "value" in case.given else "key"
        if case.given[name].shape[1] < 3 or "broadcast" in case.layout:
            continue
        arrays = with_forward(case.problem, case.given, "cpu", np)
        expected = Dense(case.problem, arrays, np).run()
        moved = arrays | {name: np.ascontiguousarray(np.roll(arrays[name], 1, 1))}
        other = Dense(case.problem, moved, np).run()
        if all(np.array_equal(other[n].expected, expected[n].expected) for n in expected):
            continue  # nothing is seen
        got = call(case.problem, moved, "cpu")
        tried += 1
        found += any(wrong(got[name], result, np) for name, result in expected.items())
    assert tried > 4
    assert found == tried
