"""Which generation of NATTEN a call is of.

A function or module of NATTEN has a signature in each generation: its forms. Where no generation
was asked for, a call is of the newest one that accepts it, and every argument given by position
must mean the same in all that accept it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from cuneigh.compat.natten._switch import RELEASES, chosen

SYNONYMS = {"dim": "embed_dim", "bias": "rel_pos_bias"}
"""What arguments of modules were called before, and are called now."""


class Form(NamedTuple):
    """A signature, all of whose parameters can be given by position or by name."""

    generation: str
    function: Callable[..., Any]
    names: tuple[str, ...]
    meanings: tuple[str, ...]
    """`names` without `SYNONYMS`."""
    required: tuple[str, ...]

    def accepts(self, count: int, keywords: Mapping[str, Any]) -> bool:
        """Whether it takes `count` arguments by position, and these by name."""
        if count > len(self.names):
            return False
        rest = self.names[count:]
        return all(name in rest for name in keywords) and all(
            name in keywords for name in rest if name in self.required
        )


def form(generation: str, function: Callable[..., Any]) -> Form:
    """The form of `function`, which `generation` has."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    required = [name for name in names if parameters[name].default is inspect.Parameter.empty]
    meanings = tuple(SYNONYMS.get(name, name) for name in names)
    return Form(generation, function, names, meanings, tuple(required))


def settle(
    call: str, forms: Sequence[Form], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """What performs a call of ``natten.{call}``, and the keyword arguments that it takes.

    Keyword arguments that are None stand for no argument where that makes the call acceptable.

    Raises
    ------
    TypeError
        If generations give an argument different meanings, or none accepts the arguments.
    AttributeError
        If the generation that was asked for has no such name.
    NotImplementedError
        For a keyword that no generation here has.
    """
    generation = chosen()
    if generation is not None:
        forms = _of(generation, call, forms)
    if len(forms) == 1 and generation is not None:
        return forms[0].function, kwargs
    accepting = [form for form in forms if form.accepts(len(args), kwargs)]
    if not accepting:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        accepting = [form for form in forms if form.accepts(len(args), kwargs)]
    if not accepting:
        raise _not_accepted(call, forms, len(args), kwargs)
    newest = accepting[-1]
    meanings = newest.meanings[: len(args)]
    if any(form.meanings[: len(args)] != meanings for form in accepting):
        raise _ambiguous(call, accepting, args)
    return newest.function, kwargs


def _of(generation: str, call: str, forms: Sequence[Form]) -> list[Form]:
    own = [form for form in forms if form.generation == generation]
    if not own:
        raise AttributeError(
            f"natten.{call} is not there in NATTEN {generation}, which was asked for; it is in "
            f"{_listed(form.generation for form in forms)}"
        )
    return own


def _ambiguous(call: str, forms: Sequence[Form], args: Sequence[Any]) -> TypeError:
    told, of = [], {form.generation for form in forms}
    for index, value in enumerate(args):
        meanings: dict[str, list[str]] = {}
        for form in forms:
            meanings.setdefault(form.names[index], []).append(form.generation)
        if len({SYNONYMS.get(name, name) for name in meanings}) > 1:
            choices = "; ".join(f"{name} in {_listed(having)}" for name, having in meanings.items())
            told.append(f"argument {index + 1}, {_shown(value)}, is {choices}")
    return TypeError(
        f"natten.{call}: the meaning of what is given by position changed between releases of "
        f"NATTEN: {'. '.join(told)}. Give it by name, or say which release is meant, by "
        f"cuneigh.compat.natten.install(generation=..) with one of "
        f"{', '.join(repr(name) for name in RELEASES if name in of)}"
    )


def _not_accepted(
    call: str, forms: Sequence[Form], count: int, kwargs: Mapping[str, Any]
) -> Exception:
    for old, new in SYNONYMS.items():
        if old in kwargs and new in kwargs:
            return TypeError(f"natten.{call}: {old} and {new} are one argument; give either")
    told = []
    for name in kwargs:
        known = [form.generation for form in forms if name in form.names]
        if not known:
            return NotImplementedError(f"natten.{call}: {name} has no counterpart in cuneigh")
        told.append(f"{name} ({_listed(known)})")
    signatures = "; ".join(
        f"{form.generation}: {', '.join(form.names[: max(count + 2, 6)])}, .." for form in forms
    )
    return TypeError(
        f"natten.{call}: no release of NATTEN takes {count} arguments by position and, by name, "
        f"{', '.join(told) or 'none'}. The first ones are: {signatures}"
    )


def _listed(generations: Any) -> str:
    named = set(generations)
    return ", ".join(generation for generation in RELEASES if generation in named)


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, list))
    return repr(value) if plain else f"of type {type(value).__name__}"


_signed: list[tuple[Callable[..., Any], Sequence[Form], bool]] = []


def of_any_generation(module: str, name: str, forms: Sequence[Form]) -> Callable[..., Any]:
    """The function `name` of `module`, which takes calls of every generation."""

    @functools.wraps(forms[-1].function)
    def call(*args: Any, **kwargs: Any) -> Any:
        function, given = settle(name, forms, args, kwargs)
        return function(*args, **given)

    call.__module__, call.__name__, call.__qualname__ = module, name, name
    _signed.append((call, forms, False))
    return call


def constructor(forms: Sequence[Form]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers an ``__init__`` for `sign`."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _signed.append((function, forms, True))
        return function

    return register


def sign(generation: str) -> None:
    """Let `inspect` see the signatures of `generation`."""
    self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    for function, forms, is_method in _signed:
        for form in forms:
            if form.generation == generation:
                signature = inspect.signature(form.function)
                parameters = [self, *signature.parameters.values()]
                if is_method:
                    signature = signature.replace(parameters=parameters)
                function.__signature__ = signature  # type: ignore[attr-defined]
