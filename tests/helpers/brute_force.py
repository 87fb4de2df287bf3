"""Neighborhood attention in plain Python loops, straight from the rules and for tiny problems.

It shares nothing with the library but the fields of `Problem` and `Axis`: visibility is written out
again, softmax and its gradient are taken term by term. `dense` is the other independent road,
masked softmax attention on whole matrices.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from cuneigh._problem import Operands, Problem
from cuneigh._window import Axis


def window_of(axis: Axis, x: int) -> list[tuple[int, int]]:
    """(slot, token of the layout) of every key of the layout that query x sees along one axis."""
    k, s, d, length = axis.kernel_size, axis.stride, axis.dilation, axis.layout
    x += axis.query_start
    if axis.border == "wrap":
        x %= length
    group, i = x % d, x // d
    keys = math.ceil((length - group) / d)
    if axis.is_causal:
        leader = min((i // s) * s + s - 1, keys - 1)
        seen = list(range(max(leader - k + 1, 0), i + 1))
    else:
        leader = min((i // s) * s + s // 2, keys - 1)
        start = leader - k // 2
        if axis.border == "shift":
            if start < 0:
                start = 0
            if start > keys - k:
                start = keys - k
        seen = list(range(start, start + k))
    if axis.border == "wrap":
        seen = [j % keys for j in seen]
    elif axis.border == "cut":
        seen = [j for j in seen if 0 <= j < keys]
    return [(slot, j * d + group) for slot, j in enumerate(seen)]


def given_key(axis: Axis, token: int) -> int | None:
    """The local number of a key of the layout; None if it is not given."""
    y = token - axis.key_start
    if axis.border == "wrap":
        y %= axis.layout
    return y if 0 <= y < axis.key_length else None


def slots_along(axis: Axis, x: int) -> list[tuple[int, int]]:
    """(slot, key token) of every given key that query token x sees along one axis."""
    given = [(slot, given_key(axis, token)) for slot, token in window_of(axis, x)]
    return [(slot, y) for slot, y in given if y is not None]


def sees(axis: Axis, x: int, y: int) -> bool:
    """Whether query token x sees key token y along one axis."""
    return y in visible_keys(axis, x)


def seers(problem: Problem, token: tuple[int, ...]) -> np.ndarray:
    """[X1..Xr] Which queries see the key at `token`."""
    along = [
        [sees(axis, x, y) for x in range(axis.length)]
        for axis, y in zip(problem.axes, token, strict=True)
    ]
    result = np.array(along[0])
    for others in along[1:]:
        result = np.logical_and.outer(result, others)
    return result


def visible_keys(axis: Axis, x: int) -> list[int]:
    """Key tokens that query token x sees along one axis, in the order of their slots."""
    return [y for _, y in slots_along(axis, x)]


def visible_mask(problem: Problem) -> np.ndarray:
    """[queries, keys]: what is seen on every axis; additional keys are not among the keys."""
    mask = np.ones((1, 1), bool)
    for axis in problem.axes:
        along = np.zeros((axis.length, axis.key_length), bool)
        for x in range(axis.length):
            along[x, visible_keys(axis, x)] = True
        mask = np.kron(mask, along)
    return mask


def queries(problem: Problem):
    """Indices (b, x, h) of every query head, and the kv head that it reads."""
    for b in range(problem.batch):
        for x in itertools.product(*(range(n) for n in problem.tokens)):
            for h in range(problem.heads):
                yield b, x, h, h // (problem.heads // problem.kv_heads)


def neighbors(problem: Problem, operands: Operands, b: int, x: tuple[int, ...]):
    """(slot, where, offset) of every key that query token x of batch entry b sees.

    `where` is ("token", y) or ("additional", j), `offset` the index into rpb of a token.
    """
    along = [slots_along(axis, xi) for axis, xi in zip(problem.axes, x, strict=True)]
    for combination in itertools.product(*along):
        slot = 0
        for (a, _), axis in zip(combination, problem.axes, strict=True):
            slot = slot * axis.kernel_size + a
        y = tuple(token for _, token in combination)
        if operands.key_mask is not None and not operands.key_mask[(b, *y)]:
            continue
        offset = tuple(
            relative(axis, xi, a)
            for (a, _), xi, axis in zip(combination, x, problem.axes, strict=True)
        )
        yield slot, ("token", y), offset
    for j in range(problem.additional or 0):
        yield math.prod(axis.kernel_size for axis in problem.axes) + j, ("additional", j), None


def relative(axis: Axis, x: int, slot: int) -> int:
    """Index into rpb, along one axis without strides, of a slot of query token x."""
    k, d = axis.kernel_size, axis.dilation
    i = (x + axis.query_start) % max(axis.layout, 1) // d
    if axis.border == "wrap":
        return slot - k // 2 + k - 1  # the query itself is in slot k // 2
    token = dict(window_of(axis, x))[slot]
    return token // d - i + k - 1


def dot(a, b) -> float:
    return math.fsum(float(ai) * float(bi) for ai, bi in zip(a, b, strict=True))


def row_of(tokens, additional, b, where, kv):
    """The key or value vector at `where`; writing to it writes to the array."""
    kind, position = where
    return tokens[(b, *position, kv)] if kind == "token" else additional[b, position, kv]


def logit(problem: Problem, operands: Operands, b, x, h, kv, where, offset) -> float:
    key = row_of(operands.key, operands.additional_keys, b, where, kv)
    result = problem.scale * dot(operands.query[(b, *x, h)], key)
    if offset is not None and operands.rpb is not None:
        result += float(operands.rpb[(h, *offset)])
    return result


def forward(problem: Problem, operands: Operands):
    output = np.zeros(problem.output.shape)
    lse = np.full(problem.lse.shape, -np.inf)
    for b, x, h, kv in queries(problem):
        keys = list(neighbors(problem, operands, b, x))
        logits = [logit(problem, operands, b, x, h, kv, where, offset) for _, where, offset in keys]
        top = max(logits, default=-math.inf)
        if top == -math.inf:
            continue
        lse[(b, *x, h)] = top + math.log(math.fsum(math.exp(value - top) for value in logits))
        for (_, where, _), value in zip(keys, logits, strict=True):
            weight = math.exp(value - lse[(b, *x, h)])
            row = row_of(operands.value, operands.additional_values, b, where, kv)
            output[(b, *x, h)] += weight * np.asarray(row, np.float64)
    return output, lse


def backward(problem: Problem, operands: Operands, grad_output, grad_lse) -> Operands:
    """Through the whole Jacobian of softmax: dS_i = sum_j dP_j P_j (delta_ij - P_i) + dlse P_i."""
    gradients = zeros(problem)
    for b, x, h, kv in queries(problem):
        keys = list(neighbors(problem, operands, b, x))
        logits = [logit(problem, operands, b, x, h, kv, where, offset) for _, where, offset in keys]
        top = max(logits, default=-math.inf)
        if top == -math.inf:
            continue
        total = math.fsum(math.exp(value - top) for value in logits)
        weights = [math.exp(value - top) / total for value in logits]
        d_output = np.asarray(grad_output[(b, *x, h)], np.float64)
        d_weights = [
            dot(d_output, row_of(operands.value, operands.additional_values, b, where, kv))
            for _, where, _ in keys
        ]
        for i, (_, where, offset) in enumerate(keys):
            d_logit = weights[i] * float(grad_lse[(b, *x, h)]) + math.fsum(
                d_weights[j] * weights[j] * ((i == j) - weights[i]) for j in range(len(keys))
            )
            d_value = row_of(gradients.value, gradients.additional_values, b, where, kv)
            d_value += weights[i] * d_output
            add_logit(problem, operands, gradients, b, x, h, kv, where, offset, d_logit)
    return gradients


def qk(problem: Problem, operands: Operands) -> np.ndarray:
    logits = np.full(problem.logits.shape, -np.inf)
    for b, x, h, kv in queries(problem):
        for slot, where, offset in neighbors(problem, operands, b, x):
            logits[(b, *x, h, slot)] = logit(problem, operands, b, x, h, kv, where, offset)
    return logits


def qk_backward(problem: Problem, operands: Operands, grad_logits) -> Operands:
    gradients = zeros(problem)
    for b, x, h, kv in queries(problem):
        for slot, where, offset in neighbors(problem, operands, b, x):
            d_logit = float(grad_logits[(b, *x, h, slot)])
            add_logit(problem, operands, gradients, b, x, h, kv, where, offset, d_logit)
    return gradients


def av(problem: Problem, weights, operands: Operands) -> np.ndarray:
    output = np.zeros(problem.output.shape)
    for b, x, h, kv in queries(problem):
        for slot, where, _ in neighbors(problem, operands, b, x):
            row = row_of(operands.value, operands.additional_values, b, where, kv)
            output[(b, *x, h)] += float(weights[(b, *x, h, slot)]) * np.asarray(row, np.float64)
    return output


def av_backward(problem: Problem, weights, operands: Operands, grad_output):
    grad_weights, gradients = np.zeros(problem.logits.shape), zeros(problem)
    for b, x, h, kv in queries(problem):
        d_output = np.asarray(grad_output[(b, *x, h)], np.float64)
        for slot, where, _ in neighbors(problem, operands, b, x):
            row = row_of(operands.value, operands.additional_values, b, where, kv)
            grad_weights[(b, *x, h, slot)] = dot(d_output, row)
            d_value = row_of(gradients.value, gradients.additional_values, b, where, kv)
            d_value += float(weights[(b, *x, h, slot)]) * d_output
    return grad_weights, gradients


def add_logit(problem, operands, gradients, b, x, h, kv, where, offset, d_logit) -> None:
    """What the gradient of one logit means for query, key and rpb."""
    key = row_of(operands.key, operands.additional_keys, b, where, kv)
    query = operands.query[(b, *x, h)]
    gradients.query[(b, *x, h)] += problem.scale * d_logit * np.asarray(key, np.float64)
    d_key = row_of(gradients.key, gradients.additional_keys, b, where, kv)
    d_key += problem.scale * d_logit * np.asarray(query, np.float64)
    if offset is not None and gradients.rpb is not None:
        gradients.rpb[(h, *offset)] += d_logit


def zeros(problem: Problem) -> Operands:
    return Operands(
        *(None if spec is None else np.zeros(spec.shape) for spec in problem.gradient_specs)
    )


def dense(query, key, value, mask, scale):
    """Masked softmax attention: ``(output, lse)``.

    query [batch, queries, heads, dim], key and value [batch, keys, heads, dim], mask [queries,
    keys] True where seen; every query sees something.
    """
    logits = scale * np.einsum("bnhd,bmhd->bhnm", query, key)
    logits = np.where(mask, logits, -np.inf)
    lse = np.logaddexp.reduce(logits, axis=-1)
    output = np.einsum("bhnm,bmhd->bnhd", np.exp(logits - lse[..., None]), value)
    return output, np.moveaxis(lse, 1, 2)
