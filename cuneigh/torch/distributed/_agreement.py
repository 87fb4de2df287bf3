"""What all ranks of a group must agree on before they wait for each other, and who is missing.

Messages of the agreement go through the key-value store by which the process group was made, so
that a rank that does not come can be named, which the errors of gloo and NCCL don't do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from cuneigh._messages import shown

PATIENCE = 5.0
"""Seconds in which other ranks that wait for the same message are expected to fail as well."""


STORE_LOST = "the process that holds the store of the process groups, rank 0 or torchrun, is gone"


class Agreement:
    """That of one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        """Global ranks of the members."""
        self.here = self.ranks[dist.get_rank(group)]
        self._group = group
        prefix = f"cuneigh/{group.group_name}/{self.ranks[0]}"
        self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self._agreed: set[str] = set()
        self._terms: dict[str, Any] = {}
        """Of the last call."""
        self._round = 0
        self._end: str | None = None
        """Why no call can use the group any more."""

    def require(self, call: str, terms: Mapping[str, Any], device: torch.device) -> None:
        """Raise, alike on all ranks, unless all of them make this call on these terms.

        They are compared the first time only that this rank has them.
        """
        if self._end is not None:
            raise RuntimeError(f"{call}: this process group has failed before: {self._end}")
        self._terms = {"call": call, **terms}
        said = json.dumps(terms)
        if said in self._agreed:
            return
        try:
            answers = self._exchanged(call, self._terms, device)
        except dist.DistNetworkError as error:
            self._end = f"{STORE_LOST}; no call can use process group {self._group.group_name}"
            raise RuntimeError(f"{call}: {self._end} ({error})") from error
        first = answers[self.ranks[0]]
        for rank, answer in answers.items():
            if "error" in answer:
                raise RuntimeError(f"{call}: rank {rank} failed with {answer['error']}")
        for rank, answer in answers.items():
            if difference := _difference(self.ranks[0], first, rank, answer):
                raise ValueError(f"{call}: ranks differ in {difference}")
        self._agreed.add(said)

    def refuse(self, error: Exception) -> None:
        """Tell the other ranks, which may be waiting, that this one does not make the call."""
        with suppress(dist.DistNetworkError):
            self._say({"error": f"{type(error).__name__}: {error}"})

    def _say(self, answer: Mapping[str, Any]) -> int:
        turn, self._round = self._round, self._round + 1
        self._store.set(f"{turn}/{self.here}", json.dumps(answer))
        return turn

    def _exchanged(
        self, call: str, answer: Mapping[str, Any], device: torch.device
    ) -> dict[int, dict[str, Any]]:
        """What every rank said in this round."""
        turn = self._say(answer)
        seconds = self.timeout(device)
        missing = self._missing(str(turn), self.ranks, seconds)
        if missing:
            self._end = (
                f"{_named(missing)} did not make this call within the {seconds:g} s that process "
                f"group {self._group.group_name} waits; no call can use it any more"
            )
            raise RuntimeError(f"{call}: {self._end}")
        return {rank: json.loads(self._store.get(f"{turn}/{rank}")) for rank in self.ranks}

    def _missing(self, place: str, ranks: list[int], seconds: float) -> list[int]:
        """The ranks that have said nothing at `place` of the store after some seconds."""
        until, pause = time.monotonic() + seconds, 0.001
        missing = ranks
        while True:
            # Asked one by one, and never waited for: a store serves one question at a time, and
            # others of this process have questions as well.
            missing = [rank for rank in missing if not self._store.check([f"{place}/{rank}"])]
            if not missing or time.monotonic() > until:
                return missing
            time.sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def timeout(self, device: torch.device) -> float:
        """Seconds that the group waits for messages of this kind of device."""
        backend = self._group._get_backend(device)
        seconds: float = backend.options._timeout.total_seconds()
        return seconds

    @contextmanager
    def waiting(self, call: str, peers: list[int]) -> Iterator[None]:
        """Name the peers, by their global ranks, that an exchange which fails has waited for.

        Ranks that are alive fail as well, within the timeout of the group, and say so.
        """
        try:
            yield
        except RuntimeError as error:
            try:
                why = self._reason(peers)
            except dist.DistNetworkError:
                why = f"waited for {_named(peers)}; {STORE_LOST}"
            self._end = (
                f"rank {self.here} exchanged keys and values in process group "
                f"{self._group.group_name}, and {why}; no call can use it any more"
            )
            raise RuntimeError(f"{call}: {self._end} ({error})") from error

    def _reason(self, peers: list[int]) -> str:
        """Why an exchange with these ranks failed."""
        self._store.set(f"failed/{self.here}", "")
        # gloo's ranks wait for all others, also those that have nothing for them
        absent = self._missing("failed", self.ranks, PATIENCE)
        missing = [rank for rank in absent if rank in peers] or absent or peers
        for rank in self.ranks:
            place = f"{self._round}/{rank}"
            if self._store.check([place]):
                answer = json.loads(self._store.get(place))
                if "error" in answer:
                    return f"rank {rank} failed with {answer['error']}"
                difference = _difference(self.here, self._terms, rank, answer)
                return f"waited for {_named(missing)}: ranks differ in {difference}"
        return f"waited for {_named(missing)}"


def _difference(first: int, terms: Mapping[str, Any], rank: int, others: Mapping[str, Any]) -> str:
    """In what two ranks differ; empty if in nothing."""
    for name in [*terms, *others]:
        one, other = terms.get(name), others.get(name)
        if one != other:
            return f"{name}: rank {first} has {shown(one)}, rank {rank} has {shown(other)}"
    return ""


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


_agreements: dict[str, Agreement] = {}


def agreement_of(group: dist.ProcessGroup) -> Agreement:
    """That of a group, for as long as it lives."""
    known = _agreements.get(group.group_name)
    if known is None or known._group is not group:
        known = _agreements[group.group_name] = Agreement(group)
    return known
