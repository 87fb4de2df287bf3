"""What other libraries take for the same problem, in the same process, on the same numbers.

A peer is a function of `Given` that returns `Calls`, or raises `UnfitError` with the reason why it
does not fit, as one that is not installed does; any other error is its own failure. Each is asked
for what it does best for the problem. Where its windows are cut at the borders and ours are
shifted, only queries far from the borders are compared, and its note says so.
"""

from __future__ import annotations

from cuneigh._measure.peers.agreement import check_forward, check_step
from cuneigh._measure.peers.contract import Calls, Given, Peer, UnfitError, given_to
from cuneigh._measure.peers.flash import windowed
from cuneigh._measure.peers.flex import in_tiles, raster
from cuneigh._measure.peers.natten import natten
from cuneigh._measure.peers.sdpa import sdpa

PEERS: dict[str, Peer] = {
    "SDPA": sdpa,
    "FlexAttention": raster("TRITON"),
    "FlexAttention, FLASH": raster("FLASH"),
    "FlexAttention, tiles": in_tiles("TRITON", whole=False),
    "FlexAttention, tiles and permutations": in_tiles("TRITON", whole=True),
    "FlashAttention-4, block-sparse": in_tiles("FLASH", whole=False),
    "FlashAttention-4, block-sparse and permutations": in_tiles("FLASH", whole=True),
    "FlashAttention-4, window_size": windowed(deterministic=False),
    "FlashAttention-4, window_size, deterministic": windowed(deterministic=True),
    "NATTEN": natten,
}
"""By the name under which their times are told."""

__all__ = [
    "PEERS",
    "Calls",
    "Given",
    "Peer",
    "UnfitError",
    "check_forward",
    "check_step",
    "given_to",
]
