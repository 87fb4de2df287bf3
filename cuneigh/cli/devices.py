"""GPUs that are not at hand, to see how a problem is cut for them."""

from __future__ import annotations

from dataclasses import replace

from cuneigh._device import SHARED_MEMORY, Device, of_capability

MULTIPROCESSORS = {
    (7, 5): 72,
    (8, 0): 108,
    (8, 6): 84,
    (8, 7): 16,
    (8, 9): 128,
    (9, 0): 132,
    (10, 0): 148,
    (10, 3): 160,
    (11, 0): 20,
    (12, 0): 170,
    (12, 1): 48,
}
"""Of the largest product of each compute capability; others count as the one before them."""


def device_of(arch: str) -> Device:
    """The GPU of an architecture such as sm_90; ValueError for what is none."""
    digits = arch.removeprefix("sm_").rstrip("af")
    capability = divmod(int(digits), 10) if digits.isdigit() else None
    if capability not in SHARED_MEMORY:
        known = ", ".join(f"sm_{major}{minor}" for major, minor in SHARED_MEMORY)
        raise ValueError(f"--arch {arch} is not one of {known}")
    device = of_capability(capability)
    name = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    before = max(each for each in MULTIPROCESSORS if each <= capability)
    return replace(device, name=name, sm_count=MULTIPROCESSORS[before])
