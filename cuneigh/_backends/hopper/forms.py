"""The kernels that a problem may take: with tiles of most warpgroups, or for a chunk of queries."""

from __future__ import annotations

from functools import lru_cache

from cuneigh._backends.hopper.plan import Form, form_of, most_warpgroups, shared_bytes
from cuneigh._device import Device
from cuneigh._gpu.passes import FORWARD, Pass
from cuneigh._problem import Problem

CLUSTERS = (1, 2, 3, 4, 6)
"""Blocks that may share the boxes of a chunk: sizes of clusters that find room on an H200.

Of 7 or 8 there are 15 at a time, of 6 there are 17 (`CLUSTERS` of cuneigh/_gpu/costs.py).
"""


def forms_of(problem: Problem, device: Device, pass_: Pass = FORWARD) -> tuple[Form, ...]:
    """The forms of a problem of any length: that with most warpgroups, and perhaps some with two.

    These are for few queries: one warpgroup has all of a head, and the other takes a head that
    shares its key head. There is a kernel for that (chunk.cu), which takes no masks and no
    additional keys.
    """
    most = most_warpgroups(problem, pass_)
    largest = form_of(problem, device, pass_, most)
    if most < 3 or pass_ != FORWARD or problem.rank > 1 or problem.group_size % 2:
        return (largest,)
    if problem.has_key_mask or problem.additional:
        pairs = form_of(problem, device, pass_, 2)
        return (largest, pairs) if problem.group_size % 3 else (largest,)
    return (largest, *(chunk_form(problem, device, cluster) for cluster in CLUSTERS))


MOST_STAGES = 6
"""Boxes beyond which nothing is gained by more."""


@lru_cache(maxsize=1024)
def chunk_form(problem: Problem, device: Device, cluster: int) -> Form:
    """The form of the kernel for a chunk: keys come from memory, hence many boxes of them."""
    forms = (
        Form(2, 128, stages, row_slots=2, cluster=cluster) for stages in range(MOST_STAGES, 1, -1)
    )
    room = device.shared_memory
    return next(form for form in forms if shared_bytes(problem, form, FORWARD) <= room)
