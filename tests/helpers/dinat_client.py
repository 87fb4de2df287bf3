"""``python dinat_client.py DEVICE``: transformers' DiNAT on cuneigh against dense attention.

A process of its own, since `install` must come before the import of transformers. Each model runs
twice, with random weights: as it is, and with its two calls replaced by a dense masked computation
in PyTorch, which receives what the model hands over, and returns results heads-first. Outputs and
the gradients of all parameters must agree.
"""

from __future__ import annotations

import sys
from unittest import mock

import cuneigh.compat.natten

cuneigh.compat.natten.install()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.models.dinat import modeling_dinat  # noqa: E402

from cuneigh._window import Axis  # noqa: E402


def slots(length: int, kernel_size: int, dilation: int, device: str) -> torch.Tensor:
    """The keys in the window of each query along one axis: [length, kernel_size]."""
    axis = Axis(length, length, kernel_size, 1, dilation, False)
    rows = []
    for token in range(length):
        start, end = axis.window(token // dilation, token % dilation)
        rows.append([token % dilation + dilation * index for index in range(start, end)])
    return torch.tensor(rows, device=device)


def dense_qkrpb(query, key, rpb, kernel_size, dilation):
    """Logits of all pairs of tokens, of which those of the windows are picked."""
    if WIDTH_FIRST:
        query, key = query.transpose(1, 3), key.transpose(1, 3)
    height, width = query.shape[2:4]
    logits = torch.einsum("bhxyd,bhvwd->bhxyvw", query, key)
    rows = slots(height, kernel_size, dilation, query.device)
    columns = slots(width, kernel_size, dilation, query.device)
    x, y = torch.arange(height, device=query.device), torch.arange(width, device=query.device)
    picked = logits[
        :, :, x[:, None, None, None], y[:, None, None], rows[:, None, :, None], columns[:, None, :]
    ]
    down = (rows // dilation - x[:, None] // dilation + kernel_size - 1)[:, None, :, None]
    right = (columns // dilation - y[:, None] // dilation + kernel_size - 1)[:, None, :]
    return (picked + rpb[:, down, right]).flatten(-2)


def dense_av(weights, value, kernel_size, dilation):
    """The weights are spread over all tokens, zero outside of the windows."""
    if WIDTH_FIRST:
        value = value.transpose(1, 3)
    height, width = value.shape[2:4]
    rows = slots(height, kernel_size, dilation, value.device)
    columns = slots(width, kernel_size, dilation, value.device)
    at = (rows[:, None, :, None] * width + columns[:, None, :]).flatten(-2)
    spread = weights.new_zeros(*weights.shape[:-1], height * width)
    spread = spread.scatter(-1, at.expand(weights.shape), weights)
    return torch.einsum("bhxyt,bhtd->bhxyd", spread, value.flatten(2, 3))


def is_width_first() -> bool:
    """Whether this release of transformers hands over ``[batch, width, height, heads, dim]``.

    NATTEN wants ``[batch, heads, height, width, dim]``, which 4.52 gives and 4.54 does not.
    """
    module = modeling_dinat.NeighborhoodAttention(transformers.DinatConfig(), 8, 2, 3, 1)
    shapes = []

    def stop(query, *_):
        shapes.append(tuple(query.shape))
        raise StopIteration

    original, modeling_dinat.natten2dqkrpb = modeling_dinat.natten2dqkrpb, stop
    try:
        module(torch.zeros(1, 5, 7, 8))
    except StopIteration:
        pass
    finally:
        modeling_dinat.natten2dqkrpb = original
    assert shapes in ([(1, 2, 5, 7, 4)], [(1, 7, 5, 2, 4)]), shapes
    return shapes == [(1, 7, 5, 2, 4)]


KINDS = ("DinatModel", "DinatForImageClassification", "DinatBackbone")
MODELS = {
    "two stages": {"depths": [2, 1], "num_heads": [2, 4], "dilations": [[1, 3], [1]]},
    "as many heads as columns": {"depths": [2], "num_heads": [8], "dilations": [[1, 2]]},
}


def main(device: str) -> None:
    assert modeling_dinat.natten2dav.__module__ == "cuneigh.compat.natten.functional"
    torch.set_num_threads(1)  # for small arrays
    for kind in KINDS:
        torch.manual_seed(0)
        for shape in MODELS.values():
            check(kind, device, shape)


def check(kind: str, device: str, shape: dict) -> None:
    config = transformers.DinatConfig(
        embed_dim=16, **shape, kernel_size=3, num_labels=5, drop_path_rate=0.0
    )
    model = getattr(transformers, kind)(config).to(device, torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            torch.nn.init.normal_(parameter)
    pixels = torch.randn(2, 3, 44, 32, device=device, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        results = model(pixels)
        result = results.feature_maps[-1] if kind == "DinatBackbone" else results[0]
        (result**2).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [result.detach(), *gradients]

    made = run()
    calls = {"natten2dqkrpb": dense_qkrpb, "natten2dav": dense_av}
    with mock.patch.multiple(modeling_dinat, **calls):
        wanted = run()
    assert len(made) == len(wanted) > 10
    for got, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


WIDTH_FIRST = is_width_first()

if __name__ == "__main__":
    main(*sys.argv[1:])
