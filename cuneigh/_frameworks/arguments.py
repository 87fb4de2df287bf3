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
    adapter: Adapter | None = None
    first, device = "", None
    for name, array in arrays.items():
        own = adapter_of(call, name, array)
        own.check(call, name, array, borrowed=borrowed)
        own_device = own.own_device(array)
        if adapter is None:
            first, adapter, device = name, own, own_device
        elif own is not adapter:
            raise TypeError(
                f"{call}: {name} is of type {type_name(array)}, but {first} is of type "
                f"{type_name(arrays[first])}: all arrays must be of one framework"
            )
        elif own_device != device and own_device is not None and device is not None:
            raise ValueError(
                f"{call}: {name} is on device {own_device}, but {first} is on device {device}: all "
                f"arrays must be on one device"
            )
    assert adapter is not None, "a call has at least one array"
    return adapter, device
