"""Problems of few queries, such as those of a decoder, and all plans of `fused` for them."""

from __future__ import annotations

import numpy as np

from cuneigh._backends.fused.split import plan as split_plan
from cuneigh._backends.fused.split.plan import SplitPlan
from cuneigh._device import Device
from cuneigh._problem import Problem
from cuneigh._window import Axis


def few_queries(
    rng: np.random.Generator, dtype: str, dims: tuple[int, int], longest: int = 1500
) -> Problem:
    """Of any border and window, parts of a layout of which some or all keys are given."""
    while True:
        dilation = int(rng.choice([1, 1, 1, 2, 3]))
        border = str(rng.choice(["shift", "cut", "wrap"]))
        layout = int(rng.integers(longest // 2, longest)) // dilation * dilation
        is_causal = border == "shift" and bool(rng.random() < 0.7)
        most = layout // dilation
        kernel_size = int(rng.integers(most // 2, most + 1))
        stride = int(rng.choice([1, rng.integers(1, kernel_size + 1)]))
        queries = int(rng.choice([1, 1, rng.integers(2, split_plan.MOST_QUERIES + 1)]))
        keys = int(rng.choice([layout, rng.integers(1, layout + 1)]))
        starts = (int(rng.integers(0, layout - length + 1)) for length in (queries, keys))
        window = kernel_size, stride, dilation, is_causal, border, layout
        axis = Axis(queries, keys, *window, *starts)
        batch, kv_heads = (int(n) for n in rng.integers(1, 3, 2))
        heads = kv_heads * int(rng.choice([1, 3, 4, 17]))
        problem = Problem("forward", dtype, batch, heads, kv_heads, *dims, (axis,), 0.1)
        if split_plan.takes(problem, split_plan.FORWARD):
            return problem


def plans(problem: Problem, device: Device) -> list[SplitPlan]:
    """With all forms, and several splits whether or not these pay."""
    found = []
    for form in split_plan.forms(problem, device):
        whole = split_plan.whole(problem, form)
        splits = {1, 3} if form.cluster == 1 else {form.cluster}
        found += [whole.split(count) for count in splits]
    return [*found, *split_plan.candidates(problem, device)]
