"""What a problem must be for a GPU to compute it, whatever the backend."""

from __future__ import annotations

from cuneigh._device import Device, installation


def no_gpu(device: Device) -> str | None:
    """Why nothing runs on `device` that needs a GPU; None when it is one."""
    if device.kind == "cuda":
        return None
    return (
        "needs arrays on a CUDA device, but these are on the CPU; with an NVIDIA GPU, "
        f"{installation()} and pass CuPy, PyTorch or JAX arrays that live on it"
    )
