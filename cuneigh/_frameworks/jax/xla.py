"""XLA's foreign function interface from Python: what its C header declares, and nothing compiled.

XLA runs a custom call through a C function that receives a call frame: the addresses of arguments
and results, attributes, the stage of the execution, and a table of functions of XLA's own.
`register` makes such a function of a Python one by ctypes, which takes the GIL for it. The
structures are those of ``xla/ffi/api/c_api.h``, which JAX ships in ``jax.ffi.include_dir()``; what
is used of them has been the same since version 0.1 of that interface, that of JAX 0.7.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import (
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import lru_cache
from typing import Any, ClassVar

import jax

from cuneigh._frameworks.jax.leaving import call_under_way

VERSION = (0, 1)
"""The version of the interface that the structures are those of; XLA refuses it once too old."""

INTERNAL = 13
"""XLA's code for an error that is not the caller's."""

EXECUTE = 3
"""The stage at which arguments hold their numbers; those before it have nothing to do here."""

METADATA = 1
"""The type of the extension by which XLA asks what a handler is, in place of calling it."""

Fields = list[tuple[str, Any]]


class Extension(Structure):
    _fields_: ClassVar[Fields] = [("struct_size", c_size_t), ("type", c_int), ("next", c_void_p)]


HEADER: Fields = [("struct_size", c_size_t), ("extension", POINTER(Extension))]
"""How every structure of the interface begins."""


class Version(Structure):
    _fields_: ClassVar[Fields] = [*HEADER, ("major", c_int), ("minor", c_int)]


class Metadata(Structure):
    _fields_: ClassVar[Fields] = [
        ("struct_size", c_size_t),
        ("version", Version),
        ("traits", c_uint32),
    ]


class MetadataExtension(Structure):
    _fields_: ClassVar[Fields] = [("base", Extension), ("metadata", POINTER(Metadata))]


class ByteSpan(Structure):
    _fields_: ClassVar[Fields] = [("start", c_void_p), ("length", c_size_t)]


class Buffer(Structure):
    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    ]


class Buffers(Structure):
    """Arguments, and likewise results."""

    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(Buffer))),
    ]


class Attributes(Structure):
    """The attributes of a call, all of which are strings here."""

    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("size", c_int64),
        ("types", c_void_p),
        ("names", c_void_p),
        ("values", POINTER(POINTER(ByteSpan))),
    ]


class Table(Structure):
    """XLA's functions. Each takes one structure and returns an error, or null if there is none."""

    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("version", Version),
        ("internal", c_void_p),
        ("error_create", c_void_p),
        ("error_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
        ("type_register", c_void_p),
        ("context_get", c_void_p),
        ("state_set", c_void_p),
        ("state_get", c_void_p),
        ("memory_allocate", c_void_p),
        ("memory_free", c_void_p),
        ("pool_schedule", c_void_p),
        ("pool_threads", c_void_p),
        ("future_create", c_void_p),
        ("future_available", c_void_p),
        ("future_error", c_void_p),
        ("run_id", c_void_p),
        ("device_ordinal", c_void_p),
    ]


class Frame(Structure):
    """One call."""

    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("table", c_void_p),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", Buffers),
        ("results", Buffers),
        ("attributes", Attributes),
    ]


class ErrorCreate(Structure):
    _fields_: ClassVar[Fields] = [*HEADER, ("message", c_char_p), ("code", c_int)]


class ErrorDestroy(Structure):
    _fields_: ClassVar[Fields] = [*HEADER, ("error", c_void_p)]


class StreamGet(Structure):
    _fields_: ClassVar[Fields] = [*HEADER, ("context", c_void_p), ("stream", c_void_p)]


class MemoryAllocate(Structure):
    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("context", c_void_p),
        ("size", c_size_t),
        ("alignment", c_size_t),
        ("data", c_void_p),
    ]


class MemoryFree(Structure):
    _fields_: ClassVar[Fields] = [
        *HEADER,
        ("context", c_void_p),
        ("size", c_size_t),
        ("data", c_void_p),
    ]


ALIGNMENT = 16
"""The strictest alignment that XLA lets one ask for; its GPU allocators give 256 bytes."""

Function = Callable[[Any], int | None]
FUNCTION: Any = ctypes.CFUNCTYPE(c_void_p, c_void_p)


class Api:
    """The functions of one table, callable with one of the structures above."""

    def __init__(self, address: int) -> None:
        table = Table.from_address(address)
        self._create = FUNCTION(table.error_create)
        self._destroy = FUNCTION(table.error_destroy)
        self._functions = {
            StreamGet: FUNCTION(table.stream_get),
            MemoryAllocate: FUNCTION(table.memory_allocate),
            MemoryFree: FUNCTION(table.memory_free),
        }

    def error(self, message: str) -> int | None:
        """A new error, which whoever receives it owns."""
        asked = ErrorCreate(ctypes.sizeof(ErrorCreate), None, message.encode(), INTERNAL)
        return self._create(ctypes.byref(asked))  # type: ignore[no-any-return]

    def ask(self, kind: type[Structure], context: int, *values: int) -> Any:
        """A structure of this kind, with the answer of the function that it belongs to."""
        asked = kind(ctypes.sizeof(kind), None, context, *values)
        error = self._functions[kind](ctypes.byref(asked))
        if error:
            refused = ErrorDestroy(ctypes.sizeof(ErrorDestroy), None, error)
            self._destroy(ctypes.byref(refused))
            raise RuntimeError(f"XLA refused {kind.__name__}{values}")
        return asked


api_at = lru_cache(Api)
"""The functions of the table at an address; a process has as many as it has copies of XLA."""


class Call:
    """What a handler may ask about the call that it is to serve, while it serves it."""

    def __init__(self, frame: Frame) -> None:
        self._context = frame.context
        self._api = api_at(frame.table)
        self._owned: list[tuple[int, int]] = []
        text = frame.attributes.values[0].contents
        self.text: bytes = ctypes.string_at(text.start, text.length)
        self._frame = frame
        self.arguments = _addresses(frame.arguments)
        self.results = _addresses(frame.results)

    def stream(self) -> int:
        """The CUDA stream on which the arguments become ready and the results are awaited."""
        return self._api.ask(StreamGet, self._context).stream or 0

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the arguments."""
        given = self._frame.arguments
        buffers = [given.buffers[i].contents for i in range(given.size)]
        return tuple(tuple(buffer.dims[: buffer.rank]) for buffer in buffers)

    def allocate(self, size: int) -> int:
        """The address of new device memory, which is XLA's again after the call."""
        if not size:
            return 0
        data: int = self._api.ask(MemoryAllocate, self._context, size, ALIGNMENT).data
        self._owned.append((size, data))
        return data

    def free(self) -> None:
        """Give all memory back: to the stream, on which kernels may still be using it."""
        while self._owned:
            self._api.ask(MemoryFree, self._context, *self._owned.pop())


def _addresses(buffers: Buffers) -> list[int]:
    return [buffers.buffers[i].contents.data or 0 for i in range(buffers.size)]


def register(name: str, platform: str, serve: Callable[[Call], None]) -> None:
    """Have XLA call `serve` for the custom call `name` on `platform`."""

    def handle(address: int) -> int | None:
        frame = Frame.from_address(address)
        if frame.extension and frame.extension.contents.type == METADATA:
            _describe(frame)
            return None
        if frame.stage != EXECUTE:
            return None
        _keep_thread()
        try:
            with call_under_way(address):
                call = Call(frame)
                try:
                    serve(call)
                finally:
                    call.free()
        except BaseException as error:  # nothing may pass through XLA's frames, Ctrl-C neither
            return api_at(frame.table).error(f"{type(error).__name__}: {error}")
        return None

    function = FUNCTION(handle)
    _functions.append(function)
    jax.ffi.register_ffi_target(
        name,
        jax.ffi.pycapsule(ctypes.cast(function, c_void_p)),
        platform=platform,
        api_version=1,
    )


_functions: list[Any] = []
"""The C functions that XLA holds, which must live as long as the process does."""


_kept = threading.local()


def _keep_thread() -> None:
    """Have Python remember the current thread, one of XLA's, from call to call.

    It would otherwise forget all that is local to the thread at the end of a call, where CuPy holds
    its cuBLAS handle, which takes milliseconds to make. This is the thread's reference to itself.
    """
    if not hasattr(_kept, "thread"):
        _kept.thread = ctypes.pythonapi.PyGILState_Ensure()


def _describe(frame: Frame) -> None:
    """Answer XLA's question what this handler is.

    It has no traits: a call chooses kernels, compiles them and takes workspace as it runs, so XLA
    must not record it in a command buffer and replay the recording.
    """
    extension = ctypes.cast(frame.extension, POINTER(MetadataExtension)).contents
    metadata = extension.metadata.contents
    metadata.version.major, metadata.version.minor = VERSION
    metadata.traits = 0
