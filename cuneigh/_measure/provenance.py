"""What a result says of where it comes from."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import cuneigh
from cuneigh._device import Device

ROOT = Path(__file__).resolve().parents[2]


def provenance(device: Device) -> dict[str, str]:
    """The device, the versions, the commit of a checkout, and the day."""
    about = _of_gpu(device) if device.kind == "cuda" else _of_cpu()
    about["cuneigh"] = cuneigh.__version__
    found = commit()
    if found is not None:
        about["commit"] = found
    return {**about, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def _of_gpu(device: Device) -> dict[str, str]:
    import cupy

    driver = _output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"
    )
    version = ".".join(str(part) for part in cupy.cuda.nvrtc.getVersion())
    return {"gpu": device.name, "driver": driver or "unknown", "cuda": version}


def _of_cpu() -> dict[str, str]:
    import threadpoolctl

    blas = [each for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]
    names = [
        f"{each['internal_api']} {each['version']}, {each['num_threads']} threads" for each in blas
    ]
    return {"cpu": cpu_model(), "cores": str(os.cpu_count()), "blas": "; ".join(names)}


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((x.split(": ", 1)[1] for x in lines if x.startswith("model name")), "unknown")


def commit() -> str | None:
    """`COMMIT`, or the one that is checked out, marked when the sources differ from it.

    None of an installed package.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if not (ROOT / ".git").exists():
        return None
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12") or None


def _output(*command: str) -> str:
    """What a command prints; nothing where it is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
