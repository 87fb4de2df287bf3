"""What a cubin says of its kernel."""

from __future__ import annotations

import struct
from collections.abc import Iterator

KPARAM_INFO, SIZED_VALUE = 0x17, 0x04
"""The attribute that describes one parameter, and the format of attributes that have a size."""


def parameter_sizes(cubin: bytes) -> list[int]:
    """The bytes of every parameter of the only kernel in `cubin`, in their order."""
    sizes: dict[int, int] = {}
    for name, content in _sections(cubin):
        if name.startswith(b".nv.info."):
            sizes |= _parameters(content)
    return [sizes[i] for i in range(len(sizes))]


def code_of(cubin: bytes) -> dict[bytes, bytes]:
    """The machine code of every function in `cubin`."""
    return {name: content for name, content in _sections(cubin) if name.startswith(b".text.")}


def length(cubin: bytes) -> int:
    """How many bytes its tables of sections and of segments say that it has at least."""
    tables = struct.unpack_from("<QQ", cubin, 32)  # of segments, and of sections
    sizes = struct.unpack_from("<HHHH", cubin, 54)
    return max(tables[0] + sizes[0] * sizes[1], tables[1] + sizes[2] * sizes[3])


def _sections(cubin: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of every section."""
    (sections_start,) = struct.unpack_from("<Q", cubin, 40)
    count, names_section = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_start + 64 * i) for i in range(count)]
    names_start = sections[names_section][4]
    for name, _type, _flags, _address, start, size in sections:
        first = names_start + name
        yield cubin[first : cubin.index(b"\0", first)], cubin[start : start + size]


def _parameters(attributes: bytes) -> dict[int, int]:
    """The sizes of parameters by their number."""
    sizes = {}
    at = 0
    while at < len(attributes):
        form, attribute, value = struct.unpack_from("<BBH", attributes, at)
        at += 4
        if form == SIZED_VALUE:
            if attribute == KPARAM_INFO:
                _index, number, _offset, described = struct.unpack_from("<IHHI", attributes, at)
                sizes[number] = described >> 18
            at += value
    return sizes
