"""What a DLPack capsule holds: the structures of ``dlpack.h``, read from Python.

NumPy would read a capsule too, but not one of bfloat16.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    py_object,
)
from typing import Any, ClassVar

VERSION = 1
"""The major version of DLPack that the structures are those of."""

Fields = list[tuple[str, Any]]


class DeviceRecord(Structure):
    _fields_: ClassVar[Fields] = [("kind", c_int32), ("index", c_int32)]


class DtypeRecord(Structure):
    _fields_: ClassVar[Fields] = [("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16)]


class Tensor(Structure):
    """``DLTensor``."""

    _fields_: ClassVar[Fields] = [
        ("data", c_void_p),
        ("device", DeviceRecord),
        ("ndim", c_int32),
        ("dtype", DtypeRecord),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class Versioned(Structure):
    """``DLManagedTensorVersioned``; what it is called from before 1.0 begins with its tensor."""

    _fields_: ClassVar[Fields] = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", Tensor),
    ]


# Functions of our own: the attributes of those of `ctypes.pythonapi` are shared by all libraries.
_is_valid: Any = ctypes.PYFUNCTYPE(c_int, py_object, c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer: Any = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def tensor_in(capsule: object) -> Tensor:
    """The tensor in a DLPack capsule of the old or the versioned kind.

    It is read and not taken out, so that the capsule gives the memory back when it is deleted.
    Raises TypeError for anything else, and BufferError for a version that is not known.
    """
    if _is_valid(capsule, b"dltensor_versioned"):
        address = _pointer(capsule, b"dltensor_versioned")
        managed = Versioned.from_address(address)
        if managed.major != VERSION:
            raise BufferError(
                f"it returned a capsule of DLPack {managed.major}.{managed.minor}, of which "
                f"version {VERSION} is known here"
            )
        # Not `managed.tensor`, which would keep `managed` alive and nothing else.
        return Tensor.from_address(address + Versioned.tensor.offset)
    if _is_valid(capsule, b"dltensor"):
        return Tensor.from_address(_pointer(capsule, b"dltensor"))
    raise TypeError(f"it returned {type(capsule).__name__} and no DLPack capsule")
