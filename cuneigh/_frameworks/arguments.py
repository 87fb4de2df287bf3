"""The check that the array arguments of a call are of one framework and on one device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cuneigh._frameworks.contract import Adapter, type_name

AdapterOf = Callable[[str, str, Any], Adapter]
"""Finds the adapter for an array, given the call and the argument's name for the error."""


def examine(
    call: str, arrays: Mapping[str, Any], adapter_of: AdapterOf, *, borrowed: bool = True
) -> tuple[Adapter, Any]:
    """The adapter and the own device of the arguments of `call`, of which there is at least one.

    Raises TypeError or ValueError for anything that is not an array, for an array that cannot be
    used, and for arrays of different frameworks or devices.
    """
    found = {name: adapter_of(call, name, array) for name, array in arrays.items()}
    first, adapter = next(iter(found.items()))
    for name, own in found.items():  # one that takes the arrays of the others as well, if any does
        if own.adopts(adapter):
            first, adapter = name, own
    for name, own in found.items():
        if own is not adapter and not adapter.adopts(own):
            raise TypeError(
                f"{call}: {name} is of type {type_name(arrays[name])}, but {first} is of type "
                f"{type_name(arrays[first])}: all arrays must be of one framework"
            )
        own.check(call, name, arrays[name], borrowed=borrowed)
    return adapter, adapter.common_device(call, arrays)
