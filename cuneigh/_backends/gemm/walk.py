"""A walk over the tiles of a problem, chunk by chunk: its matrices and what runs on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuneigh import _jit
from cuneigh._backends.gemm import cublas
from cuneigh._backends.gemm.plan import MOST_MATRICES, GemmPlan, allows_tf32
from cuneigh._backends.gemm.sources import THREADS, address_source, move_source
from cuneigh._gpu.arrays import Array, Pointer
from cuneigh._gpu.program import Program
from cuneigh._gpu.records import fill_problem, problem_type
from cuneigh._gpu.views import Views, load_width
from cuneigh._problem import DTYPES, Problem

ITEMS = 8
"""Packets that a thread of the gathering kernels moves, and rows that a team of lanes takes."""


@dataclass(eq=False)
class Matrix:
    """A matrix [rows, width] of every tile: in the workspace, or in place in a call's arrays."""

    rows: int
    width: int
    dtype: str
    buffer: Array | None
    """[tiles of a chunk, rows, width], or None in place."""
    tokens: Any = None
    """The array [batch, x1..xr, heads, width] whose tokens are the rows, if they are tokens."""
    additional: Any = None
    """The array [batch, n, heads, width] of the additional keys (or values), if there are any."""
    is_halo: bool = False
    """Whether the tokens are those of the halo, not of the queries."""


class Walk:
    """The matrices of a problem, and its chunks. Matrices are declared first, then walked over."""

    def __init__(self, problem: Problem, plan: GemmPlan, program: Program) -> None:
        self.problem = problem
        self.plan = plan
        self.program = program
        self.matrices: list[Matrix] = []
        self.addresses: Any = None
        """[matrices, tiles of a chunk], if tokens are multiplied in place."""

    # Matrices

    def dense(self, dtype: str) -> Matrix:
        """A product of queries and keys: [rows, columns]."""
        return self._declare(self._workspace(self.plan.rows, self.plan.columns, dtype))

    def queries(self, tokens: Any) -> Matrix:
        """The rows of the tile's queries in `tokens`, to be read or to be written."""
        return self._declare(self._tokens(tokens, self.plan.rows))

    def keys(self, tokens: Any, additional: Any) -> Matrix:
        """The rows of the halo in `tokens`, and the additional ones."""
        matrix = self._tokens(tokens, self.plan.columns)
        matrix.additional, matrix.is_halo = additional, True
        return self._declare(matrix)

    def halo(self, width: int) -> Matrix:
        """Gradients of the keys of the halo, to be summed."""
        return self._declare(self._workspace(self.plan.columns, width, self.problem.accumulator))

    def _tokens(self, tokens: Any, rows: int) -> Matrix:
        if self.plan.direct:
            return Matrix(rows, tokens.shape[-1], tokens.dtype, None, tokens)
        matrix = self._workspace(rows, tokens.shape[-1], tokens.dtype)
        matrix.tokens = tokens
        return matrix

    def _workspace(self, rows: int, width: int, dtype: str) -> Matrix:
        return Matrix(
            rows, width, dtype, self.program.allocate((self.plan.chunk, rows, width), dtype)
        )

    def _declare(self, matrix: Matrix) -> Matrix:
        self.matrices.append(matrix)
        return matrix

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in their order, for which launches are to be added."""
        if self.plan.direct:
            # Two words each, of a dtype that every framework has
            self.addresses = self.program.allocate(
                (len(self.matrices), self.plan.chunk, 2), "float32"
            )
        for tiles in self.plan.chunks():
            chunk = Chunk(self, tiles)
            if self.plan.direct:
                chunk.locate()
            yield chunk


class Chunk:
    """The tiles of a walk that are in the workspace together, and what is launched for them."""

    def __init__(self, walk: Walk, tiles: range) -> None:
        self.walk = walk
        self.problem, self.plan = walk.problem, walk.plan
        self.tiles = tiles

    def multiply(
        self,
        result: Matrix,
        left: Matrix,
        right: Matrix,
        factor: float = 1.0,
        transpose_left: bool = False,
        transpose_right: bool = False,
        adds: bool = False,
    ) -> None:
        """``result = factor * left @ right`` in every tile; with `adds`, ``+=``."""
        inner = left.rows if transpose_left else left.width
        product = cublas.Product(
            self._batch(result),
            self._batch(left),
            self._batch(right),
            (result.rows, result.width, inner),
            len(self.tiles),
            factor,
            compute_type(self.problem.dtype),
            transpose_left,
            transpose_right,
            adds,
        )
        self.walk.program.add(product)

    def _batch(self, matrix: Matrix) -> cublas.Matrices:
        if not self.plan.direct:
            assert matrix.buffer is not None, "only tokens in place have none"
            stride = matrix.rows * matrix.width
            return cublas.Matrices(matrix.buffer.pointer, matrix.width, stride, matrix.dtype)
        row_stride = matrix.width
        if matrix.buffer is None:
            row_stride = matrix.tokens.strides[-3] * self.problem.axes[-1].dilation
        index = self.walk.matrices.index(matrix)
        start = self.walk.addresses.pointer
        data = Pointer(start.slot, start.offset + 8 * index * len(self.tiles))
        return cublas.Matrices(data, row_stride, None, matrix.dtype)

    def locate(self) -> None:
        """Have a kernel write the addresses of every matrix of every tile."""
        words: list[int | Pointer] = []
        for matrix in self.walk.matrices:
            if matrix.buffer is not None:
                stride = matrix.rows * matrix.width * DTYPES[matrix.dtype]
                words += matrix.buffer.pointer, 0, 0, 0, stride, 0
            else:
                batch, token, *_, head, _ = matrix.tokens.byte_strides
                words += matrix.tokens.pointer, batch, token, head, 0, matrix.is_halo
        words += [0] * (6 * MOST_MATRICES - len(words))
        words.append(self.walk.addresses.pointer)
        self._run(
            "gemm/addresses",
            address_source(self.problem),
            (math.ceil(len(self.tiles) / THREADS), len(self.walk.matrices)),
            words,
        )

    def gather(self, *matrices: Matrix) -> None:
        """Pack the tokens of these matrices, unless they are multiplied in place."""
        for matrix in matrices:
            if matrix.buffer is None:
                continue
            vector = load_width((matrix.tokens, matrix.additional)) // DTYPES[matrix.dtype]
            views = Views(self.problem.rank)
            views.vectors(matrix.tokens)
            views.additional(matrix.additional)
            views.addresses(matrix.buffer)
            slices = _slices(matrix.rows * matrix.width // vector, THREADS * ITEMS)
            self._launch(
                "gemm/pack",
                move_source(self.problem, vector, kKeys=matrix.is_halo),
                views,
                slices * len(self.tiles),
                matrix.width,
                slices,
            )

    def scatter(self, *matrices: Matrix) -> None:
        """Bring computed rows of queries back to their tokens."""
        for matrix in matrices:
            if matrix.buffer is None:
                continue
            vector = load_width((matrix.tokens,)) // DTYPES[matrix.dtype]
            views = Views(self.problem.rank)
            views.vectors(matrix.tokens)
            views.addresses(matrix.buffer)
            slices = _slices(matrix.rows * matrix.width // vector, THREADS * ITEMS)
            self._launch(
                "gemm/unpack",
                move_source(self.problem, vector),
                views,
                slices * len(self.tiles),
                matrix.width,
                slices,
            )

    def sum_halos(self, halo: Matrix, target: Any, additional: Any, partial: Any) -> None:
        """Add the gradients of the halos of this chunk up into those of the keys."""
        problem, plan = self.problem, self.plan
        width = load_width((target, additional))
        vector = min(width // DTYPES[problem.dtype], 16 // DTYPES[problem.accumulator])
        views = Views(problem.rank)
        views.vectors(target)
        views.additional(additional)
        views.addresses(halo.buffer, partial)
        first = self.tiles.start // plan.pair_tiles
        pairs = (self.tiles.stop - 1) // plan.pair_tiles + 1 - first
        keys = math.prod(problem.key_tokens) + (problem.additional or 0)
        threads = pairs * keys * halo.width // vector
        self._launch(
            "gemm/halo_sum",
            move_source(problem, vector),
            views,
            math.ceil(threads / THREADS),
            halo.width,
            self.tiles.start % plan.pair_tiles != 0,
            self.tiles.stop % plan.pair_tiles == 0,
        )

    def row_kernel(self, name: str, source: str, views: Views) -> None:
        """Launch a kernel that takes the rows of the tiles one by one."""
        slices = _slices(self.plan.rows, ITEMS * THREADS // self.plan.lanes(self.problem))
        self._launch(name, source, views, slices * len(self.tiles), slices)

    def _launch(self, name: str, source: str, views: Views, blocks: int, *numbers: int) -> None:
        """Launch a kernel whose arguments are views and, after them, numbers."""
        self._run(name, source, (blocks, 1), [*views.words, *numbers])

    def _run(
        self, name: str, source: str, grid: tuple[int, int], words: list[int | Pointer]
    ) -> None:
        record = _record(self.problem, self.plan).copy()
        record["first"], record["count"] = self.tiles.start, len(self.tiles)
        self.walk.program.launch(_jit.Kernel(name, source), grid, THREADS, record, words)


def _slices(work: int, share: int) -> int:
    """Blocks for the work of a tile, of which each does a share."""
    return max(1, math.ceil(work / share))


def compute_type(dtype: str) -> int:
    """The precision in which cuBLAS multiplies."""
    if dtype == "float64":
        return cublas.FLOAT64
    if dtype == "float32":
        return cublas.FLOAT32_TF32 if allows_tf32() else cublas.FLOAT32_EXACT
    return cublas.FLOAT32


@lru_cache(maxsize=1024)
def _record(problem: Problem, plan: GemmPlan) -> npt.NDArray[Any]:
    """`Tiles` of cuda/gemm/tiles.cuh, but for the tiles of a chunk."""
    fields = [
        ("problem", problem_type(problem.rank)),
        ("halo", "i4", (problem.rank,)),
        ("columns", "i4"),
        ("first", "i8"),
        ("count", "i8"),
    ]
    record = np.zeros(1, np.dtype(fields, align=True))
    fill_problem(record["problem"], problem, plan.box, plan.boxes)
    record["halo"], record["columns"] = plan.halo, plan.columns
    return record
