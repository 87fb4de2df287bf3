"""Neighborhood attention of arrays in host memory, tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from cuneigh import _device
from cuneigh._backends import BackendName, NoBackendError
from cuneigh._call import of_nothing
from cuneigh._frameworks.contract import Adapter, import_cupy, numpy_dtype
from cuneigh._frameworks.numpy import ADAPTER as NUMPY
from cuneigh._messages import shown
from cuneigh._ops.neighborhood import na1d, na2d, na3d
from cuneigh._ops.types import Borders, Flags, Scale, Sizes
from cuneigh._parameters import (
    boolean,
    integer,
    part_arguments,
    scale_or_default,
    window_arguments,
)
from cuneigh._problem import OPTIONAL, Operands, Problem
from cuneigh._validate import problem_of, require

Array = npt.NDArray[Any]
Pair = tuple[Array, Array]

NAME = "tiled"
FUNCTIONS = {na1d: 1, na2d: 2, na3d: 3}
"""What can be computed tile by tile, and the token axes of each."""


@overload
def tiled(
    function: Any,
    query: Array,
    key: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    rpb: Array | None = None,
    return_lse: Literal[False] = False,
    backend: BackendName | None = None,
    *,
    max_bytes: int,
    border: Borders = "shift",
    key_mask: Array | None = None,
    out: Array | None = None,
    device: int | Literal["cpu"] | None = None,
) -> Array: ...


@overload
def tiled(
    function: Any,
    query: Array,
    key: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    rpb: Array | None = None,
    *,
    return_lse: Literal[True],
    backend: BackendName | None = None,
    max_bytes: int,
    border: Borders = "shift",
    key_mask: Array | None = None,
    out: Pair | None = None,
    device: int | Literal["cpu"] | None = None,
) -> Pair: ...


def tiled(
    function: Any,
    query: Array,
    key: Array,
    value: Array,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: Flags = False,
    scale: Scale | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    rpb: Array | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
    *,
    max_bytes: int,
    border: Borders = "shift",
    key_mask: Array | None = None,
    out: Array | Pair | None = None,
    device: int | Literal["cpu"] | None = None,
) -> Array | Pair:
    """`na1d`, `na2d` or `na3d` of NumPy arrays of any size, in a bounded number of bytes on a GPU.

    The queries are cut into tiles. Each is brought to the GPU with the keys that it sees, and its
    output is copied back, beside the computation of the tile before. The results are those of one
    call on all of the arrays, but for how sums are rounded. Nothing is differentiated.

    Arrays may be memory maps (``numpy.memmap``), of which no more than a tile is read at a time. On
    a terminal a bar shows how many tiles are done, where `rich` is installed; with CUNEIGH_QUIET=1
    there is none.

    Parameters
    ----------
    function : cuneigh.na1d, cuneigh.na2d or cuneigh.na3d
        What to compute.
    query, key, value : arrays [B, X1.., H, D], [B, X1.., H_kv, D] and [B, X1.., H_kv, D_v]
        NumPy's, as all others here: float16, bfloat16 (that of ml_dtypes), float32 or float64.
    kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, rpb
        As in `na2d`; `scale` is a number.
    return_lse : bool
        Whether to return the logarithm of the sum of the exponentials of all logits as well.
    backend : str, optional
        As in `na2d`.
    max_bytes : int
        What all that is on the GPU at a time may take, in bytes: arguments, results and workspace
        of two tiles, or of one if that is all there are. The host takes as much again for the
        copies, out of CuPy's pool of pinned memory. On the CPU it limits the copies of one tile's
        arguments and results, and CUNEIGH_WORKSPACE_BYTES what is computed in between.
    border : str, or one per token axis
        As in `na2d`. The tiles of a ring go on over its seam.
    key_mask : array of bool [B, X1..], optional
        As in `na2d`.
    out : array [B, X1.., H, D_v], optional
        Where to write the output, such as a memory map; an array is made if it is not given. With
        `return_lse` the pair of it and an array [B, X1.., H] for the lse. They must not have memory
        in common with the arguments.
    device : int or "cpu", optional
        The number of the CUDA device, or ``"cpu"``. If not given, CuPy's current device, or the CPU
        where there is no GPU.

    Returns
    -------
    output : array [B, X1.., H, D_v]
        `out`, or a new array of the query's dtype.
    lse : array [B, X1.., H]
        With `return_lse` only: natural logarithm, float32 (float64 for float64 arrays).

    Raises
    ------
    TypeError, ValueError
        For an illegal argument, as `na2d` does, and where `max_bytes` has no room for tiles of one
        query each and what these see.
    RuntimeError
        If no backend can run the problem.

    Notes
    -----
    A tile costs what its visible pairs cost. Keys that several tiles see are copied for each; among
    all sizes of tiles some are chosen for which there are few of these.

    Examples
    --------
    A volume in a file, its output in another, and never more than 1 MB of either in memory:

    >>> import cuneigh, numpy, tempfile
    >>> volume = numpy.random.default_rng(0).standard_normal((3, 1, 24, 24, 24, 1, 8), "float32")
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = (
    ...     numpy.memmap(f"{folder.name}/{name}", "float32", "w+", shape=shape)
    ...     for name, shape in (("volume", volume.shape), ("output", volume.shape[1:]))
    ... )
    >>> source[...] = volume
    >>> output = cuneigh.tiled(
    ...     cuneigh.na3d, *source, 5, border="wrap", max_bytes=1_000_000, out=target
    ... )
    >>> bool(numpy.allclose(output, cuneigh.na3d(*volume, 5, border="wrap"), atol=1e-5))
    True
    >>> folder.cleanup()
    """
    rank = next((rank for one, rank in FUNCTIONS.items() if one is function), None)
    if rank is None:
        names = ", ".join(f"cuneigh.na{rank}d" for rank in FUNCTIONS.values())
        raise TypeError(f"{NAME}: function={shown(function)} is not one of {names}")
    operands = Operands(query, key, value, additional_keys, additional_values, rpb, key_mask)
    arrays = {
        name: array
        for name, array in operands._asdict().items()
        if array is not None or name not in OPTIONAL
    }
    for name, array in arrays.items():
        NUMPY.check(NAME, name, array, borrowed=True)
    problem = problem_of(
        NAME,
        "forward",
        {name: NUMPY.spec(array) for name, array in arrays.items()},
        window_arguments(NAME, rank, kernel_size, stride, dilation, is_causal),
        scale_or_default(NAME, scale),
        part_arguments(NAME, rank, border, None, 0, 0),
    )
    wants_lse = boolean(NAME, "return_lse", return_lse)
    most = integer(NAME, "max_bytes", max_bytes)
    where, adapter = _where(device)
    results = _results(problem, wants_lse, out, arrays)
    if problem.is_empty:
        for name, result in zip(("output", "lse"), results, strict=False):
            result[...] = of_nothing(name)
    else:
        from cuneigh import _tiled  # which few programs need

        whole = _tiled.Whole(NAME, problem, (*arrays,), wants_lse, where, adapter, backend)
        try:
            _tiled.run(whole, arrays, results, most)
        except _tiled.TooLargeError as error:
            raise ValueError(
                f"{NAME}: max_bytes={most} has no room for tiles of one query each and what these "
                f"see, which take {error.args[0]} bytes"
            ) from None
        except NoBackendError as error:
            raise RuntimeError(f"{NAME}: {error}") from None
    return (results[0], results[1]) if wants_lse else results[0]


def _where(device: object) -> tuple[_device.Device, Adapter]:
    """Where to compute, and the adapter of the arrays there."""
    if device == "cpu" or (device is None and not _gpus()):
        return _device.CPU, NUMPY
    if isinstance(device, str):
        raise ValueError(f"{NAME}: device={shown(device)} is not 'cpu' or the number of a GPU")
    import_cupy()
    import cupy

    from cuneigh._frameworks.cupy import ADAPTER as CUPY

    index = cupy.cuda.runtime.getDevice() if device is None else integer(NAME, "device", device)
    if not 0 <= index < _gpus():
        raise ValueError(
            f"{NAME}: device={index} is not the number of a GPU, of which there are {_gpus()}"
        )
    return _device.cuda(index), CUPY


def _gpus() -> int:
    """CUDA devices that CuPy finds."""
    try:
        import cupy

        count: int = cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError):
        return 0
    return count


def _results(
    problem: Problem, wants_lse: bool, out: object, arrays: Mapping[str, Array]
) -> list[Array]:
    """The arrays to fill."""
    specs = {"out": problem.output}
    if wants_lse:
        specs = {"out[0]": problem.output, "out[1]": problem.lse}
    if out is None:
        return [np.empty(spec.shape, numpy_dtype(spec.dtype)) for spec in specs.values()]
    given: tuple[Any, ...] = (out,)
    if wants_lse:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise TypeError(
                f"{NAME}: out is of type {type(out).__name__}, but with return_lse=True a pair of "
                "arrays is needed, for the output and for the lse"
            )
        given = tuple(out)
    for (name, spec), array in zip(specs.items(), given, strict=True):
        NUMPY.check(NAME, name, array, borrowed=True)
        require(NAME, name, NUMPY.spec(array), spec)
        if not array.flags.writeable:
            raise ValueError(f"{NAME}: {name} is read-only")
        for other, argument in arrays.items():
            if np.may_share_memory(array, argument):
                raise ValueError(f"{NAME}: {name} has memory in common with {other}")
    return list(given)
