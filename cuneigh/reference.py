"""The definition of neighborhood attention in float64 NumPy, written to be read.

Every backend is tested against this module, so it does the obvious thing: list the slots of every
query's window, gather the keys and values that they hold, and apply softmax attention to them. It
is slow, and it needs memory for queries times slots times head_dim of one head at a time.

All functions take a `Problem` and arrays of any supported dtype and strides. They compute in
float64, and for a float64 problem in extended precision where the platform has it, since a judge
must see more than what is judged. The results are float64 arrays whose shapes are those of
`Problem.specs`, `output`, `lse` and `logits`:

    query   [batch, X1..Xr, heads, head_dim]         output  [batch, X1..Xr, heads, value_dim]
    key     [batch, Y1..Yr, kv_heads, head_dim]      lse     [batch, X1..Xr, heads]
    value   [batch, Y1..Yr, kv_heads, value_dim]     logits  [batch, X1..Xr, heads, slots]
    additional_keys    [batch, n, kv_heads, head_dim]
    additional_values  [batch, n, kv_heads, value_dim]
    rpb                [heads, 2 * K1 - 1, .., 2 * Kr - 1]

    key_mask           [batch, Y1..Yr]

The key token axes Y are the query's X, except in cross attention and where either are parts of a
layout.

The operator is from "Neighborhood Attention Transformer" (Hassani et al., 2023), its dilation from
"Dilated Neighborhood Attention Transformer" (Hassani and Shi, 2022), and the decomposition into
products with a neighborhood and with its inverse from "Faster Neighborhood Attention: Reducing the
O(n^2) Cost of Self Attention at the Threadblock Level" (Hassani et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cuneigh._problem import DIFFERENTIATED, JvpResults, OfResults, Operands, Problem
from cuneigh._window import Axis, Promise

Floats = npt.NDArray[np.float64]
Wide = npt.NDArray[np.floating[Any]]
"""What is computed with: float64, or extended precision."""
Array = TypeVar("Array", Floats, Wide)
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


class Slots(NamedTuple):
    """What the slots of every query hold."""

    row: Integers
    """[queries, slots] Key tokens are counted in C order, the additional keys follow them."""
    visible: Booleans
    """[batch, queries, slots] False in slots that hold no key, or one that is not given or masked.
    """
    offset: Integers | None
    """[queries, window slots] Index of the bias in one head's flattened rpb; None without rpb."""


class Rows(NamedTuple):
    """Operands, or their gradients, with the token axes as one; None where absent."""

    query: Any
    """[batch, queries, heads, head_dim]"""
    keys: Any
    """[batch, key tokens + n, kv_heads, head_dim] The additional keys come last."""
    values: Any
    """[batch, key tokens + n, kv_heads, value_dim]"""
    bias: Any
    """[heads, offsets]"""

    def head(self, b: int, h: int, kv: int) -> Rows:
        """Views of what belongs to one batch entry and query head, without these two axes."""
        return Rows(
            None if self.query is None else self.query[b, :, h],
            None if self.keys is None else self.keys[b, :, kv],
            None if self.values is None else self.values[b, :, kv],
            None if self.bias is None else self.bias[h],
        )


# Non-finite inputs are legal and spread as IEEE arithmetic has it, without warnings.
_quiet = np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore")


@_quiet
def forward(problem: Problem, operands: Operands) -> tuple[Floats, Floats]:
    """Neighborhood attention: ``(output, lse)``.

    `lse` is the natural logarithm of the sum of the exponentials of a row's logits. A row whose
    logits are all -inf has lse -inf and output 0.
    """
    output, lse = np.zeros(problem.output.shape), np.full(problem.lse.shape, -np.inf)
    if problem.is_empty:
        return output, lse
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    for b, h, kv in _heads(problem):
        head, visible = rows.head(b, h, kv), slots.visible[b]
        weights, row_lse, seen = _softmax(_logits(problem, slots, visible, head), visible)
        values = _gather(head.values, slots.row, seen)
        _flat(output)[b, :, h] = np.einsum("ns,nsd->nd", weights, values)
        _flat(lse[..., None])[b, :, h, 0] = row_lse
    return output, lse


@_quiet
def backward(
    problem: Problem,
    operands: Operands,
    grad_output: npt.ArrayLike,
    grad_lse: npt.ArrayLike | None = None,
) -> Operands:
    """Gradients of `forward` with respect to every operand.

    `grad_output` has the shape of output and `grad_lse` that of lse; None stands for zeros.
    """
    if problem.is_empty:
        return _zeros(problem)
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    gradients = _rows(problem, _zeros(problem))
    d_outputs = _flat(_wide(problem, grad_output))
    d_lses = _flat(
        _wide(problem, np.zeros(problem.lse.shape) if grad_lse is None else grad_lse)[..., None]
    )
    for b, h, kv in _heads(problem):
        head, gradient = rows.head(b, h, kv), gradients.head(b, h, kv)
        d_output, d_lse, visible = d_outputs[b, :, h], d_lses[b, :, h], slots.visible[b]
        weights, _, seen = _softmax(_logits(problem, slots, visible, head), visible)
        values = _gather(head.values, slots.row, seen)
        output = np.einsum("ns,nsd->nd", weights, values)

        _scatter(gradient.values, slots.row, seen, weights[..., None] * d_output[:, None])
        d_weights = np.einsum("nd,nsd->ns", d_output, values)
        shift = d_lse - (d_output * output).sum(-1, keepdims=True)
        d_logits = np.where(seen, weights * (d_weights + shift), 0.0)
        _logits_backward(problem, slots, head, seen, d_logits, gradient)
    return _operands(problem, gradients)


@_quiet
def jvp(problem: Problem, operands: Operands, tangents: Operands) -> JvpResults:
    """`forward`, and how its results change where every operand moves along its tangent.

    With `dS` the change of the logits, `dlse = sum(P dS)` and `dO = sum(P (dS - dlse) V + P dV)`.
    """
    made = JvpResults(
        np.zeros(problem.output.shape),
        np.full(problem.lse.shape, -np.inf),
        np.zeros(problem.output.shape),
        np.zeros(problem.lse.shape),
    )
    if problem.is_empty:
        return made
    slots = window_slots(problem, operands)
    rows, directions = _rows(problem, operands), _rows(problem, tangents)
    for b, h, kv in _heads(problem):
        head, direction = rows.head(b, h, kv), directions.head(b, h, kv)
        visible = slots.visible[b]
        weights, row_lse, seen = _softmax(_logits(problem, slots, visible, head), visible)
        values = _gather(head.values, slots.row, seen)
        d_values = _gather(direction.values, slots.row, seen)
        d_logits = _logits_tangent(problem, slots, head, seen, direction)
        d_lse = (weights * d_logits).sum(-1, keepdims=True)
        d_weights = np.where(seen, weights * (d_logits - d_lse), 0.0)
        _flat(made.output)[b, :, h] = np.einsum("ns,nsd->nd", weights, values)
        _flat(made.lse[..., None])[b, :, h, 0] = row_lse
        _flat(made.tangent_lse[..., None])[b, :, h] = d_lse
        _flat(made.tangent_output)[b, :, h] = np.einsum(
            "ns,nsd->nd", d_weights, values
        ) + np.einsum("ns,nsd->nd", weights, d_values)
    return made


@_quiet
def hvp(
    problem: Problem,
    operands: Operands,
    incoming: OfResults,
    tangents: Operands,
    tangents_incoming: OfResults,
) -> tuple[Operands, OfResults]:
    """How the gradients of `backward`, and the results of `forward`, change along tangents.

    `incoming` are the gradients of the results that `backward` takes; None stands for zeros there
    and in `tangents_incoming`. It is a product with the Hessian of `sum(incoming * results)` as a
    function of the operands and `incoming`. With `dS` the change of the logits, that of the weights
    is `dP = P (dS - dlse)`; the rest is the product rule.
    """
    made = OfResults(np.zeros(problem.output.shape), np.zeros(problem.lse.shape))
    if problem.is_empty:
        return _zeros(problem), made
    slots = window_slots(problem, operands)
    rows, directions = _rows(problem, operands), _rows(problem, tangents)
    gradients = _rows(problem, _zeros(problem))
    of_output, of_lse = (
        [
            _flat(_wide(problem, np.zeros(shape) if array is None else array.reshape(shape)))
            for array in arrays
        ]
        for shape, arrays in (
            (problem.output.shape, (incoming.output, tangents_incoming.output)),
            ((*problem.lse.shape, 1), (incoming.lse, tangents_incoming.lse)),
        )
    )
    for b, h, kv in _heads(problem):
        head, direction = rows.head(b, h, kv), directions.head(b, h, kv)
        gradient, visible = gradients.head(b, h, kv), slots.visible[b]
        weights, _, seen = _softmax(_logits(problem, slots, visible, head), visible)
        values, d_values = (_gather(of.values, slots.row, seen) for of in (head, direction))
        d_logits = _logits_tangent(problem, slots, head, seen, direction)
        d_lse = (weights * d_logits).sum(-1, keepdims=True)
        d_weights = np.where(seen, weights * (d_logits - d_lse), 0.0)
        output = np.einsum("ns,nsd->nd", weights, values)
        d_output = np.einsum("ns,nsd->nd", d_weights, values)
        d_output += np.einsum("ns,nsd->nd", weights, d_values)

        # The gradients of the output, the weights and the logits, and how they change
        grad, d_grad = (array[b, :, h] for array in of_output)
        grad_lse, d_grad_lse = (array[b, :, h] for array in of_lse)
        of_weights = np.einsum("nd,nsd->ns", grad, values) + grad_lse
        of_weights -= (grad * output).sum(-1, keepdims=True)
        d_of_weights = np.einsum("nd,nsd->ns", d_grad, values) + d_grad_lse
        d_of_weights += np.einsum("nd,nsd->ns", grad, d_values)
        d_of_weights -= (d_grad * output + grad * d_output).sum(-1, keepdims=True)
        of_logits = np.where(seen, weights * of_weights, 0.0)
        d_of_logits = np.where(seen, d_weights * of_weights + weights * d_of_weights, 0.0)

        _logits_backward(problem, slots, head, seen, d_of_logits, gradient)
        _products_backward(problem, slots, direction, seen, of_logits, gradient)
        terms = d_weights[..., None] * grad[:, None] + weights[..., None] * d_grad[:, None]
        _scatter(gradient.values, slots.row, seen, terms)
        _flat(made.output)[b, :, h] = d_output
        _flat(made.lse[..., None])[b, :, h] = d_lse
    return _operands(problem, gradients), made


@_quiet
def qk(problem: Problem, operands: Operands) -> Floats:
    """Logits of every window slot, then of the additional keys; -inf in hidden slots."""
    logits = np.full(problem.logits.shape, -np.inf)
    if problem.is_empty:
        return logits
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    for b, h, kv in _heads(problem):
        head = rows.head(b, h, kv)
        _flat(logits)[b, :, h] = _logits(problem, slots, slots.visible[b], head)
    return logits


@_quiet
def qk_backward(problem: Problem, operands: Operands, grad_logits: npt.ArrayLike) -> Operands:
    """Gradients of `qk` with respect to its operands; `grad_logits` in hidden slots is ignored."""
    if problem.is_empty:
        return _zeros(problem)
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    gradients = _rows(problem, _zeros(problem))
    given = _flat(_wide(problem, grad_logits))
    for b, h, kv in _heads(problem):
        head, gradient = rows.head(b, h, kv), gradients.head(b, h, kv)
        visible = slots.visible[b]
        d_logits = np.where(visible, given[b, :, h], 0.0)
        _logits_backward(problem, slots, head, visible, d_logits, gradient)
    return _operands(problem, gradients)


@_quiet
def av(problem: Problem, weights: npt.ArrayLike, operands: Operands) -> Floats:
    """Sum of the values in every query's slots times `weights`, which has the shape of logits.

    What `weights` holds in hidden slots is never read.
    """
    output = np.zeros(problem.output.shape)
    if problem.is_empty:
        return output
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    given = _flat(_wide(problem, weights))
    for b, h, kv in _heads(problem):
        visible = slots.visible[b]
        values = _gather(rows.head(b, h, kv).values, slots.row, visible)
        read = np.where(visible, given[b, :, h], 0.0)
        _flat(output)[b, :, h] = np.einsum("ns,nsd->nd", read, values)
    return output


@_quiet
def av_backward(
    problem: Problem, weights: npt.ArrayLike, operands: Operands, grad_output: npt.ArrayLike
) -> tuple[Floats, Operands]:
    """Gradients of `av`: those of `weights`, 0 in hidden slots, and those of its operands."""
    grad_weights = np.zeros(problem.logits.shape)
    if problem.is_empty:
        return grad_weights, _zeros(problem)
    slots, rows = window_slots(problem, operands), _rows(problem, operands)
    gradients = _rows(problem, _zeros(problem))
    given, d_outputs = _flat(_wide(problem, weights)), _flat(_wide(problem, grad_output))
    for b, h, kv in _heads(problem):
        head, gradient = rows.head(b, h, kv), gradients.head(b, h, kv)
        d_output, visible = d_outputs[b, :, h], slots.visible[b]
        values = _gather(head.values, slots.row, visible)
        d_weights = np.einsum("nd,nsd->ns", d_output, values)
        _flat(grad_weights)[b, :, h] = np.where(visible, d_weights, 0.0)
        terms = given[b, :, h][..., None] * d_output[:, None]
        _scatter(gradient.values, slots.row, visible, terms)
    return grad_weights, _operands(problem, gradients)


def window_slots(problem: Problem, operands: Operands) -> Slots:
    """The slots of every query of a problem that is not empty.

    Slot ``((a1 * K2) + a2) * K3 + a3`` of a query holds the key at ``start + a`` on each axis; the
    additional keys follow.
    """
    row, visible = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    offset = np.zeros((1, 1), np.int64)
    for axis in problem.axes:
        token, axis_visible, relative = _axis_slots(axis)
        row = _outer(np.add, row * axis.key_length, token)
        visible = _outer(np.logical_and, visible, axis_visible)
        offset = _outer(np.add, offset * (2 * axis.kernel_size - 1), relative)
    shape = len(row), problem.additional or 0
    keys = math.prod(problem.key_tokens)
    row = np.where(visible, row, 0)
    row = np.hstack([row, np.broadcast_to(keys + np.arange(shape[1]), shape)])
    visible = np.hstack([visible, np.ones(shape, bool)])
    return Slots(
        row, visible & _not_masked(problem, operands, row), offset if problem.rpb_dtype else None
    )


def _not_masked(problem: Problem, operands: Operands, row: Integers) -> Booleans:
    """[batch, queries, slots]: whether the mask lets the key at `row` be seen."""
    if operands.key_mask is None:
        return np.ones((problem.batch, 1, 1), bool)
    mask = np.asarray(operands.key_mask, bool).reshape(problem.batch, math.prod(problem.key_tokens))
    mask = np.hstack([mask, np.ones((problem.batch, problem.additional or 0), bool)])
    kept: Booleans = mask[:, row]
    return kept


def _axis_slots(axis: Axis) -> tuple[Integers, Booleans, Integers]:
    """Key token, visibility and rel(query, key) of every query and slot of one axis: [X, K]."""
    query = np.arange(axis.length)[:, None]
    group, index = query % axis.dilation, query // axis.dilation
    start, end = axis.unclipped(index, group)
    key_index = start + np.arange(axis.kernel_size)
    visible, relative = key_index < end, axis.relative(index, key_index, group)
    if axis.border == "wrap" and Promise.INSIDE not in axis.promises:
        key_index = key_index % axis.ring
    key = key_index * axis.dilation + axis.key_group(group)
    visible &= (key >= 0) & (key < axis.key_length)
    return np.where(visible, key, 0), visible, np.where(visible, relative, 0)


def _outer(combine: np.ufunc, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[X, K] and [Y, J] combined into [X * Y, K * J]."""
    combined: npt.NDArray[Any] = combine(a[:, None, :, None], b[None, :, None, :])
    return combined.reshape(len(a) * len(b), a.shape[1] * b.shape[1])


def _heads(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """Every batch entry and query head, with the key head that it reads."""
    for b, h in np.ndindex(problem.batch, problem.heads):
        yield b, h, h // problem.group_size


def _logits(problem: Problem, slots: Slots, visible: Booleans, head: Rows) -> Wide:
    """[queries, slots]"""
    keys = _gather(head.keys, slots.row, visible)
    logits = problem.scale * np.einsum("nd,nsd->ns", head.query, keys)
    if slots.offset is not None:
        logits[:, : problem.window_size] += head.bias[slots.offset]
    return np.where(visible, logits, -np.inf)


def _logits_tangent(
    problem: Problem, slots: Slots, head: Rows, seen: Booleans, direction: Rows
) -> Wide:
    """[queries, slots] How the logits change along `direction`; 0 where not `seen`."""
    keys, d_keys = (_gather(of.keys, slots.row, seen) for of in (head, direction))
    d_logits = problem.scale * (
        np.einsum("nd,nsd->ns", direction.query, keys) + np.einsum("nd,nsd->ns", head.query, d_keys)
    )
    if slots.offset is not None:
        d_logits[:, : problem.window_size] += direction.bias[slots.offset]
    return np.where(seen, d_logits, 0.0)


def _logits_backward(
    problem: Problem, slots: Slots, head: Rows, seen: Booleans, d_logits: Wide, gradient: Rows
) -> None:
    """Add to `gradient` what `d_logits`, which is 0 where not `seen`, means for the operands."""
    _products_backward(problem, slots, head, seen, d_logits, gradient)
    if slots.offset is not None:
        np.add.at(gradient.bias, slots.offset, d_logits[:, : problem.window_size])


def _products_backward(
    problem: Problem, slots: Slots, head: Rows, seen: Booleans, d_logits: Wide, gradient: Rows
) -> None:
    """The same for queries and keys alone."""
    keys = _gather(head.keys, slots.row, seen)
    gradient.query[...] += problem.scale * np.einsum("ns,nsd->nd", d_logits, keys)
    terms = problem.scale * d_logits[..., None] * head.query[:, None]
    _scatter(gradient.keys, slots.row, seen, terms)


def _softmax(logits: Wide, visible: Booleans) -> tuple[Wide, Wide, Booleans]:
    """Weights, lse, and which slots take part: none in a row whose logits are all -inf."""
    top = logits.max(-1)
    alive = top != -np.inf
    top = np.where(alive, top, 0.0)
    exponentials = np.exp(logits - top[:, None])
    total = exponentials.sum(-1)
    weights = exponentials / np.where(alive, total, 1.0)[:, None]
    return weights, top + np.log(total), visible & alive[:, None]


def _gather(rows: Wide, row: Integers, seen: Booleans) -> Wide:
    """``rows[row]`` where `seen` and 0 elsewhere, so that no 0 * NaN arises in hidden slots."""
    gathered = np.zeros((*row.shape, rows.shape[-1]), rows.dtype)
    gathered[seen] = rows[row[seen]]
    return gathered


def _scatter(rows: Wide, row: Integers, seen: Booleans, terms: Wide) -> None:
    """Add `terms` to ``rows[row]`` where `seen`: the transpose of `_gather`."""
    np.add.at(rows, row[seen], terms[seen])


def _wide(problem: Problem, array: npt.ArrayLike) -> Wide:
    """A copy to compute with; contiguous, so that sums do not depend on an input's strides."""
    dtype = np.longdouble if problem.dtype == "float64" else np.float64
    return np.array(array, dtype, order="C")


def _zeros(problem: Problem) -> Operands:
    return Operands(
        *(None if spec is None else np.zeros(spec.shape) for spec in problem.gradient_specs)
    )


def _flat(array: Array) -> Array:
    """[batch, X1..Xr, heads, dim] as [batch, X1 * .. * Xr, heads, dim]."""
    return array.reshape(array.shape[0], -1, *array.shape[-2:])


def _rows(problem: Problem, operands: Operands) -> Rows:
    """The operands of a problem that is not empty, as contiguous copies."""
    query, key, value, additional_keys, additional_values, rpb = (
        None if array is None else _wide(problem, array)
        for array in operands[: len(DIFFERENTIATED)]
    )
    return Rows(
        query=None if query is None else _flat(query),
        keys=_join(key, additional_keys),
        values=_join(value, additional_values),
        bias=None if rpb is None else rpb.reshape(len(rpb), -1),
    )


def _join(tokens: Wide | None, additional: Wide | None) -> Wide | None:
    if tokens is None:
        return None
    return _flat(tokens) if additional is None else np.hstack([_flat(tokens), additional])


def _operands(problem: Problem, rows: Rows) -> Operands:
    """The inverse of `_rows`, rounded to float64."""
    split = [math.prod(problem.key_tokens)]
    key, additional_keys = (None, None) if rows.keys is None else np.split(rows.keys, split, 1)
    value, additional_values = (
        (None, None) if rows.values is None else np.split(rows.values, split, 1)
    )
    parts = rows.query, key, value, additional_keys, additional_values, rows.bias
    return Operands(
        *(
            None if spec is None or part is None else part.reshape(spec.shape).astype(np.float64)
            for part, spec in zip(parts, problem.specs[: len(DIFFERENTIATED)], strict=True)
        )
    )
