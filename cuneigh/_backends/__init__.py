"""The backends, in order of preference, and the choice among them.

This is the only file that names backends: a new one is a folder here, imported below, an element of
`BACKENDS` and its name in `BackendName`. Kernels, if it has any, are files of a folder of the same
name in `cuda/`; `cuneigh._jit.Kernel` says what a file must define.

A backend is a module with the functions of `Backend`, and says itself what it takes. It imports
only `_problem`, `_window`, `_device`, `_jit`, `_gpu` and itself. Its arrays have been validated by
`_problem` and belong to one device: NumPy's on the CPU, where it computes at once, and those of a
`Program` on a GPU, to which it adds launches. It fills results that the caller allocated, never
sees an empty problem, never writes to an input, and takes workspace only where the caller's
framework gives it. What every result must hold, `cuneigh.reference` defines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

from cuneigh._backends import cpu, fused, gemm, hopper, naive
from cuneigh._device import Device
from cuneigh._gpu import tuned
from cuneigh._gpu.announce import announce
from cuneigh._gpu.arrays import Array
from cuneigh._gpu.program import Program
from cuneigh._jit import Kernel
from cuneigh._messages import shown
from cuneigh._problem import JvpResults, OfResults, Operands, Problem
from cuneigh._window import Promise


class Allocate(Protocol):
    """Gives an uninitialized, contiguous NumPy array."""

    def __call__(self, shape: tuple[int, ...], dtype: str) -> Any: ...


Arrays = Mapping[str, Array | None]
"""Arguments by name, and results by ``result_`` and their name; None where not given or wanted."""

Space = Program | Allocate
"""Where a backend takes workspace: on a GPU the program to which it adds launches."""


class Backend(Protocol):
    """What every backend offers. `operands` and `gradients` hold None for absent arguments."""

    @property
    def NAME(self) -> str: ...  # noqa: N802 - a module constant

    @property
    def SETTINGS(self) -> tuple[str, ...]:  # noqa: N802 - a module constant
        """The environment variables on which the functions below depend, beside their arguments."""

    @property
    def RELIES_ON(self) -> Promise:  # noqa: N802 - a module constant
        """What the backend takes for granted of windows, out of the contract of `_window`."""

    def unsupported(
        self, problem: Problem, device: Device, arrays: Arrays | None = None
    ) -> str | None:
        """Why this backend cannot run `problem` on `device`; None when it can.

        `arrays` are the arguments and results of a call on a GPU. Without them the answer
        is that for contiguous arrays at aligned addresses.
        """

    def predicted_ms(self, problem: Problem, device: Device) -> float:
        """How long a call is expected to take, in milliseconds."""

    # A backend whose forward takes more than another of its operations has this:
    #
    #     def leaves_to_others(self, problem: Problem) -> str | None:
    #         """Why a derivative by this backend takes another one for `problem`; None if not."""
    #
    # A backend that can be tuned has this, too, and asks `_gpu.tuned` for its plans:
    #
    #     def plans(self, problem: Problem, device: Device) -> Mapping[str, Sequence[object]]:
    #         """By pass, the plans that are worth measuring, the best by prediction first."""

    # One that has more to say of itself in `python -m cuneigh doctor` says it:
    #
    #     def about(self) -> str:

    # One that computes problems in different ways, but plans nothing for a GPU, says which it takes
    # for one in `python -m cuneigh profile --dry-run`:
    #
    #     def method(self, problem: Problem) -> str:

    def kernels(self, problem: Problem, device: Device) -> list[Kernel]:
        """What a call of contiguous arrays loads on `device`, if the problem is supported there.

        There may be kernels among them that only calls with other windows or lengths load.
        """

    def forward(
        self, problem: Problem, operands: Operands, output: Any, lse: Any, space: Any, /
    ) -> None:
        """Fill `output`, and `lse` unless that is None."""

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        grad_output: Any,
        output: Any,
        lse: Any,
        grad_lse: Any,
        gradients: Operands,
        space: Any,
        /,
    ) -> None:
        """Fill every array of `gradients`, one for each operand; `grad_lse` may be None."""

    def jvp(
        self,
        problem: Problem,
        operands: Operands,
        tangents: Operands,
        results: JvpResults,
        space: Any,
        /,
    ) -> None:
        """Fill every array of `results`; `tangents` has one for each operand."""

    def hvp(
        self,
        problem: Problem,
        operands: Operands,
        results: OfResults,
        incoming: OfResults,
        tangents: Operands,
        tangents_incoming: OfResults,
        gradients: Operands,
        tangents_of_results: OfResults,
        space: Any,
        /,
    ) -> None:
        """Fill `gradients`, with the tangents of a backward's, and `tangents_of_results`.

        These are None where they are not wanted.
        `results` are those of the forward and `incoming` their gradients, of which that of lse may
        be None. So may either of `tangents_incoming`, where it is 0.
        """

    def qk(self, problem: Problem, operands: Operands, logits: Any, space: Any, /) -> None:
        """Fill `logits`."""

    def qk_backward(
        self,
        problem: Problem,
        operands: Operands,
        grad_logits: Any,
        gradients: Operands,
        space: Any,
        /,
    ) -> None:
        """Fill every array of `gradients`."""

    def av(
        self, problem: Problem, weights: Any, operands: Operands, output: Any, space: Any, /
    ) -> None:
        """Fill `output`."""

    def av_backward(
        self,
        problem: Problem,
        weights: Any,
        operands: Operands,
        grad_output: Any,
        grad_weights: Any,
        gradients: Operands,
        space: Any,
        /,
    ) -> None:
        """Fill `grad_weights` and every array of `gradients`."""


BackendName = Literal["hopper", "fused", "naive", "gemm", "cpu"]
"""The names of the backends, for type checkers."""

# `hopper`, `fused` and `gemm` lack functions: of the operations that their `unsupported` refuses.
BACKENDS: tuple[Backend, ...] = (
    *(cast(Backend, hopper), cast(Backend, fused), naive),
    *(cast(Backend, gemm), cpu),
)


def settings() -> tuple[object, ...]:
    """The `SETTINGS` of all backends, as the environment stores them; None for those not set."""
    # `os.environ.get` goes through an exception for a variable that is not set, which takes as long
    # as a launch does.
    stored = os.environ._data  # type: ignore[attr-defined]
    return tuple(map(stored.get, _setting_keys(BACKENDS)))


@lru_cache(maxsize=16)
def _setting_keys(backends: tuple[Backend, ...]) -> list[object]:
    """The keys of the settings in what `os.environ` keeps."""
    names = dict.fromkeys(name for backend in backends for name in backend.SETTINGS)
    return [os.environ.encodekey(name) for name in names]


def unknown(name: str | None) -> str | None:
    """What is wrong with the argument ``backend=name`` of a call; None if nothing is."""
    names = [backend.NAME for backend in BACKENDS]
    if name is None or name in names:
        return None
    return f"backend={shown(name)} is not one of {', '.join(map(repr, names))}"


def serving(name: str | None, problem: Problem) -> str | None:
    """The name by which to ask for an operation that a derivative of a call takes.

    That is the name that the call was given, unless its backend lacks the operation, or leaves such
    problems to others. Any may serve it then.
    """
    backend = {backend.NAME: backend for backend in BACKENDS}.get(name or "")
    if not hasattr(backend, problem.operation):
        return None
    leaves_to_others = getattr(backend, "leaves_to_others", None)
    return None if leaves_to_others and leaves_to_others(problem) else name


class NoBackendError(RuntimeError):
    """No backend, or not the one asked for, can run a problem; a call adds its name."""


def choose(
    problem: Problem, device: Device, name: str | None, arrays: Arrays | None = None
) -> Backend:
    """The backend called `name`, or of those that support `problem` the one expected to be fastest.

    That is the one that tuning has found, if it was asked, or that with the smallest prediction.

    `arrays` as in `Backend.unsupported`. Raises ValueError for an unknown name and NoBackendError,
    with the reason of every backend that was asked, when none can run the problem.
    """
    described = None if arrays is None else tuple(arrays.items())
    return _choose(BACKENDS, settings(), problem, device, name, described)


@lru_cache(maxsize=4096)
def _choose(
    backends: tuple[Backend, ...],
    settings: object,
    problem: Problem,
    device: Device,
    name: str | None,
    arrays: tuple[tuple[str, Array | None], ...] | None,
) -> Backend:
    candidates = [backend for backend in backends if name in (None, backend.NAME)]
    if not candidates:
        raise ValueError(unknown(name))
    given = None if arrays is None else dict(arrays)
    reasons = {backend: backend.unsupported(problem, device, given) for backend in candidates}
    supporting = [backend for backend, reason in reasons.items() if reason is None]
    if not supporting:
        told = "; ".join(f"{backend.NAME}: {reason}" for backend, reason in reasons.items())
        raise NoBackendError(f"no backend can run this problem; {told}")
    if given is not None:  # say so where the layout of arrays is all that keeps a backend away
        for backend, reason in reasons.items():
            if reason and backend.unsupported(problem, device) is None:
                announce(backend.NAME, problem.operation, problem, reason)
    if len(supporting) == 1 or problem.is_empty:  # nothing to compare, or a problem without a time
        return supporting[0]
    measured = tuned.find(problem, device)
    for backend in supporting:
        if measured is not None and measured.backend == backend.NAME:
            return backend
    return min(supporting, key=lambda backend: backend.predicted_ms(problem, device))
