"""The modules of ``natten``, as they are put in place of NATTEN's."""

from __future__ import annotations

import importlib.util
import logging
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from cuneigh.compat.natten import (
    checks,
    context,
    experimental,
    flops,
    functional,
    modules,
    types,
    varlen,
)
from cuneigh.compat.natten._names import NAMES, names_of
from cuneigh.compat.natten._switch import release
from cuneigh.compat.natten._unserved import unserved


def get_device_cc(device: Any = None) -> int:
    """The compute capability of a GPU, 90 for 9.0; 0 for a CPU."""
    if device is not None and torch.device(device).type == "cpu":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return int(major * 10 + minor)


def get_logger(name: str) -> logging.Logger:
    """The logger of a client that logs as NATTEN does."""
    return logging.getLogger(name)


OTHERS = SimpleNamespace(
    get_device_cc=get_device_cc,
    get_logger=get_logger,
    has_fvcore=importlib.util.find_spec("fvcore") is not None,
)

SERVED: list[Any] = [modules, functional, context, checks, types, flops, varlen, OTHERS]
"""What has the objects of all modules; the first that has a name counts."""

SOURCES: dict[str, list[Any]] = {"experimental": [experimental], "ops": []}
"""Of modules that have names of others for something else."""


def build(generation: str | None) -> dict[str, ModuleType]:
    """The modules of `generation`, or of all, by their full names; ``natten`` is the first."""
    tree: dict[str, ModuleType] = {}
    present = [name for name in NAMES if any(names_of(name, generation))]
    for name in NAMES:
        if name in present or any(each.startswith(f"{name}.") for each in present):
            full = f"natten.{name}".rstrip(".")
            contents = {each: _object(name, each) for each in names_of(name, generation)}
            tree[full] = _module(full, contents)
    if generation is None:  # which of the two has a switch depends on the generation
        for name in tree["natten.context"].__all__:
            vars(tree["natten"]).setdefault(name, getattr(tree["natten.context"], name))
    for full, module in tree.items():
        parent, _, name = full.rpartition(".")
        if parent and not hasattr(tree[parent], name):  # `natten.na2d` is the function from 0.20 on
            setattr(tree[parent], name, module)
    return tree


def _module(full: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(full, f"{full} of NATTEN, on cuneigh.")
    vars(module).update(contents, __all__=sorted(contents))
    is_package = any(f"natten.{name}".startswith(f"{full}.") for name in NAMES)
    module.__spec__ = ModuleSpec(full, None, origin=__file__, is_package=is_package)
    if is_package:
        module.__path__ = []
    module.__file__ = __file__
    module.__version__ = release()  # type: ignore[attr-defined]
    return module


def _object(module: str, name: str) -> Any:
    """What here stands for a name of a module of NATTEN."""
    if name == "__version__":
        return release()
    for source in SOURCES.get(module, SERVED):
        if hasattr(source, name):
            return getattr(source, name)
    return unserved(f"natten.{module}".rstrip("."), name)
