"""The adapters of frameworks that have none of their own: any whose arrays speak DLPack.

An array with ``__dlpack__`` and ``__dlpack_device__``, or on a GPU with only
``__cuda_array_interface__``, is read where it is, as an array of NumPy or CuPy (`lent`). That
computes the call, on a GPU on CuPy's current stream, and the framework takes the results over by
its own ``from_dlpack``, where it has one (`adapter`).
"""

from cuneigh._frameworks.dlpack.adapter import adapter_of_speaker

__all__ = ["adapter_of_speaker"]
