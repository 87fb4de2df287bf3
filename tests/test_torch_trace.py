"""``torch.jit.trace``: a recorded call computes the same, and refuses tensors of other shapes."""

from __future__ import annotations

import pytest

import cuneigh

torch = pytest.importorskip("torch")

from helpers.tensors import no_compiled_code  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures(no_compiled_code.__name__),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def attend(query, key, value):
    output, lse = cuneigh.na2d(query, key, value, 3, dilation=(1, 2), return_lse=True)
    weights = cuneigh.na2d_qk(query, key, 3, scale=0.5).softmax(-1)
    return output, lse, cuneigh.na2d_av(weights, value, 3)


def test_a_recorded_call_computes_the_same():
    given = [torch.randn(1, 5, 6, 2, 4, dtype=torch.float64) for _ in range(3)]
    recorded = torch.jit.trace(attend, tuple(given))
    others = [torch.randn_like(tensor, requires_grad=True) for tensor in given]
    got, wanted = recorded(*others), attend(*others)
    for each, expected in zip(got, wanted, strict=True):
        assert torch.equal(each, expected)
    sums = [sum(result.sin().sum() for result in results) for results in (got, wanted)]
    gradients = [torch.autograd.grad(total, others) for total in sums]
    for each, expected in zip(*gradients, strict=True):
        assert torch.equal(each, expected)
    with pytest.raises(RuntimeError, match="na2d: query has size 7 on axis 1, but 5 is needed"):
        recorded(*[torch.randn(1, 7, 6, 2, 4, dtype=torch.float64) for _ in range(3)])
    with pytest.raises(RuntimeError, match="na2d: query has dtype float32, but float64 is needed"):
        recorded(*[tensor.float() for tensor in given])
