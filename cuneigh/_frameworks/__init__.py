"""The frameworks whose arrays cuneigh takes, each by an adapter, and how an adapter is found.

`contract` says what an adapter must offer. An adapter is a module with an `ADAPTER`, and a line in
`ADAPTERS` below. It is imported when the first array of its framework is an argument of a call, so
that no framework is ever imported for a user who has not imported it already. Arrays of any other
framework are taken by DLPack.
"""

from __future__ import annotations

from importlib import import_module

from cuneigh._frameworks.contract import SEEN, Adapter, refuse

ADAPTERS = {
    "numpy": "cuneigh._frameworks.numpy",
    "cupy": "cuneigh._frameworks.cupy",
    "torch": "cuneigh._frameworks.torch",
    "jax": "cuneigh._frameworks.jax",
    "jaxlib": "cuneigh._frameworks.jax",
}
"""The module of the adapter, by the root module below which a framework defines its types."""


def adapter_of(call: str, name: str, array: object) -> Adapter:
    """The adapter for the argument `name` of `call`; TypeError for something that is no array."""
    adapter = SEEN.get(type(array))
    if adapter is None:
        adapter = _found(array)
        if adapter is None:
            refuse(call, name, array)
        adapter.check(call, name, array, borrowed=False)
        adapter = SEEN.setdefault(type(array), adapter)
    return adapter


def _found(array: object) -> Adapter | None:
    """The adapter for `array`, which may be of a type derived from one of a known framework."""
    for kind in type(array).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ADAPTERS:
            adapter: Adapter = import_module(ADAPTERS[root]).ADAPTER
            return adapter
    if hasattr(type(array), "__jax_array__"):  # what holds an array for JAX's own functions
        held: Adapter = import_module(ADAPTERS["jax"]).ADAPTER
        return held
    from cuneigh._frameworks.dlpack import adapter_of_speaker

    return adapter_of_speaker(array)


def load_adapter(array: object) -> None:
    """Import PyTorch's adapter if `array`, or the first entry of a sequence, is a tensor.

    `adapter_of` would do as much, but later: torch.compile follows a call instruction by
    instruction, up to the functions that the adapter has told it not to enter.
    """
    if isinstance(array, (list, tuple)) and array:
        array = array[0]
    if type(array).__module__.partition(".")[0] == "torch":
        import cuneigh._frameworks.torch  # noqa: F401
