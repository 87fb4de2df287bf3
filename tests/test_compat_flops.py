"""``natten.flops``: counts from shapes, and of the nodes that fvcore hands over."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")

from helpers.generations import choosing, installing  # noqa: E402, F401 - fixtures

from cuneigh.compat.natten import flops  # noqa: E402


def test_flops_from_shapes():
    shape, window = (2, 7, 6, 3, 4), ((3, 5), (1, 1), (False, False))
    macs = 2 * 7 * 6 * 3 * 4 * 15
    assert flops.fna_flop_count(shape, shape, shape, *window, True) == 4 * macs
    assert flops.na_qk_flop_count(shape, shape, *window, True, return_macs=True) == macs
    assert flops.na_av_flop_count(None, (2, 3, 7, 6, 4), 3, 1, False, False) == 2 * 9 * macs // 15
    with pytest.raises(ValueError, match="shapes that are alike are needed"):
        flops.na_qk_flop_count(shape, shape[::-1], *window, True)
    with pytest.raises(ValueError, match=r"kernel_size=\(3,\) has 1 entries, but there are 2"):
        flops.na_qk_flop_count(shape, shape, (3,), (1,), (False,), True)
    with pytest.raises(ValueError, match=r"4, 5 or 6 axes is needed, not \(2, 3\)"):
        flops.na_qk_flop_count((2, 3), (2, 3), 3, 1, False, True)


class Counter:
    """As much of fvcore's as is asked for; it takes each node of a graph to its handle."""

    def __init__(self) -> None:
        self.handles: dict = {}

    def set_op_handle(self, name, handle):
        self.handles[name] = handle
        return self

    def total(self, module, x) -> int:
        graph = torch.jit.trace(module, x, check_trace=False).inlined_graph
        counts = []
        for node in graph.nodes():
            if handle := self.handles.get(node.kind()):
                counts.append(handle(list(node.inputs()), list(node.outputs())))
        assert counts
        return sum(counts)


@pytest.mark.parametrize(("own", "bias"), [("0.14", 1), ("0.17", 0), ("0.21", 0)])
@pytest.mark.parametrize("attn_drop", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_counter_of_operators_counts_attention(own, bias, attn_drop, install):
    natten = install(own)
    module = natten.NeighborhoodAttention2D(8, 4, 3)
    module.attn_drop.p = attn_drop  # in training the halves compute
    counter = flops.add_natten_handle(Counter())
    logits = 2 * 4 * 6 * 7 * 9
    assert counter.total(module.train(), torch.randn(2, 6, 7, 8)) == logits * (2 * 2 + bias)


def test_counts_of_values_in_a_graph():
    def value(*sizes):
        kind = types.SimpleNamespace(sizes=lambda: list(sizes))
        return types.SimpleNamespace(type=lambda: kind)

    query, logits = value(1, 2, 6, 7, 4), value(1, 2, 6, 7, 9)
    assert flops.qk_rpb_flop([query, query, None], [logits]) == 2 * 6 * 7 * 9 * (4 + 1)
    assert flops.qk_2d_rpb_flop([query, query], [logits]) == 2 * 6 * 7 * 9 * (4 + 1)
    assert flops.av_flop([logits, query], [query]) == 2 * 6 * 7 * 9 * 4
    with pytest.raises(ValueError, match=r"flops\.av_1d_flop: tensors of 4 axes are needed, not"):
        flops.av_1d_flop([logits, query], [query])
