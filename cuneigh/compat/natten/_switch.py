"""The generation of NATTEN that was asked for, if any."""

from __future__ import annotations

RELEASES = {
    "0.14": "0.14.6",
    "0.15": "0.15.1",
    "0.17": "0.17.5",
    "0.20": "0.20.1",
    "0.21": "0.21.7",
}
"""The generations, oldest first, and the release of each whose interface is offered here."""

_chosen: str | None = None


def chosen() -> str | None:
    """The generation that was asked for; None if none was."""
    return _chosen


def choose(call: str, generation: str) -> None:
    """Ask for `generation`, which holds for the whole process."""
    global _chosen
    if generation not in RELEASES:
        names = ", ".join(map(repr, RELEASES))
        raise ValueError(f"{call}: generation={generation!r} is not one of {names}")
    if _chosen not in (None, generation):
        raise RuntimeError(
            f"{call}: generation={generation!r} comes too late: this process uses that of {_chosen}"
        )
    _chosen = generation


def release() -> str:
    """The version that is reported."""
    return RELEASES[_chosen or "0.21"]
