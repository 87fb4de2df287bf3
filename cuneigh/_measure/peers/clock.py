"""PyTorch's calls on the stream on which everything is measured."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

from cuneigh._measure.clock import Call, GpuClock, Times


class TorchClock(GpuClock):
    """Measures calls that launch on PyTorch's current stream."""

    def measure(self, call: Call, budget_ms: float = 200.0) -> Times:
        import torch

        def on_stream() -> Any:
            import cupy

            pointer = cupy.cuda.get_current_stream().ptr
            with torch.cuda.stream(torch.cuda.ExternalStream(pointer)):
                return call()

        return super().measure(on_stream, budget_ms)

    @staticmethod
    def capture(call: Call, stream: Any) -> Call | None:
        """A CUDA graph of `call` by PyTorch, whose allocator must know of it; None if it fails.

        It is captured on the stream on which `measure` has the call launch. On another one nothing
        would be captured, of which PyTorch only warns.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        with suppress(RuntimeError, UserWarning), warnings.catch_warnings():
            warnings.filterwarnings("error", "The CUDA Graph is empty")
            with torch.cuda.graph(graph, stream=torch.cuda.ExternalStream(stream.ptr)):
                call()
            return lambda: _replay(graph, stream)
        return None

    def peak(self, call: Call) -> int | None:
        import torch

        call()
        torch.cuda.synchronize()
        before: int = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        most: int = torch.cuda.max_memory_allocated()
        return most - before


def _replay(graph: Any, stream: Any) -> None:
    import torch

    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        graph.replay()
