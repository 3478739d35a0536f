"""How a schedule is declared, and the lines it is drawn with."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, cast

from torch import Tensor

from purestep._core.maths import cos, maximum, minimum, root, where
from purestep._core.values import Declaration, Schedule, factory_of

P = ParamSpec("P")

Complaint: TypeAlias = "Callable[..., str | None]"
"""Given a schedule's arguments by name: what is wrong with them together, or None."""

Shape: TypeAlias = Literal["linear", "cosine"]


def schedule(function: Callable[Concatenate[Any, P], Any]) -> Callable[P, Schedule]:
    """Turn `function(step, ...)` into a factory of schedules.

    Parameters annotated `Hyper` are its hyperparameters, which can be differentiated and vmapped over; the others are
    structure.

    Args:
        function: takes the number of the update, an int or a 0-d tensor, and then the arguments of the schedule; returns its
            value, a number or a 0-d tensor.

    Returns:
        a factory of `Schedule`s, which takes the function's arguments behind `step`.

    >>> from purestep import Hyper
    >>> @schedule
    ... def harmonic(step, peak: Hyper):
    ...     return peak / (step + 1)
    >>> harmonic(1.0)(3)
    0.25
    """
    return declared()(function)


def declared(complaint: Complaint | None = None) -> Callable[[Callable[Concatenate[Any, P], Any]], Callable[P, Schedule]]:
    """`schedule`, for arguments that must go together."""

    def declare(function: Callable[Concatenate[Any, P], Any]) -> Callable[P, Schedule]:
        hints = typing.get_type_hints(function)
        choices = {n: typing.get_args(hint) for n, hint in hints.items() if typing.get_origin(hint) is Literal}

        def made(declaration: Declaration, arguments: dict[str, Any]) -> Schedule:
            for name, known in choices.items():
                if arguments[name] not in known:
                    either = " or ".join(map(repr, known))
                    raise ValueError(f"{declaration.name}: {name} must be {either}, but got {arguments[name]!r}.")
            wrong = _warm_up_too_long(**arguments) or (complaint and complaint(**arguments))
            if wrong:
                raise ValueError(f"{declaration.name}: {wrong}.")
            return Schedule(declaration, arguments)

        return cast("Callable[P, Schedule]", factory_of(Declaration(function, given=1), made, "Schedule"))

    return declare


def _warm_up_too_long(warmup_steps: int = 0, total_steps: float = math.inf, **others: Any) -> str | None:
    if warmup_steps <= total_steps:
        return None
    return f"warmup_steps must be at most total_steps, which counts the warm-up, but got {warmup_steps} > {total_steps}"


def elapsed(step: Any, steps: int) -> Any:
    """The fraction of `steps` that has passed, at most 1; all of it when there are none."""
    return minimum(step / steps, 1.0) if steps > 0 else 1.0


def along(shape: str, start: Any, end: Any, fraction: Any) -> Any:
    """The way from `start` to `end`, after this fraction of it: a straight line, half a cosine, or falling as 1 - sqrt."""
    if shape == "linear":
        return start + (end - start) * fraction
    return end + (start - end) * (0.5 * (1 + cos(math.pi * fraction)) if shape == "cosine" else 1 - root(fraction))


def through(shape: str, places: Sequence[Any], values: Sequence[Any], step: Any) -> Any:
    """The line that is at `values` where the step is at `places`, and constant after the last."""
    found = values[0]
    for left, right, start, end in zip(places, places[1:], values, values[1:]):
        fraction = minimum(maximum((step - left) / maximum(right - left, 1e-9), 0.0), 1.0)
        found = where(step > left, along(shape, start, end, fraction), found)
    return found


def power(base: Any, exponent: Any) -> Any:
    """`base ** exponent`, infinite where Python's numbers overflow, as a tensor's are."""
    if isinstance(base, Tensor) or isinstance(exponent, Tensor):
        return base**exponent
    try:
        return float(base) ** exponent
    except OverflowError:
        return math.inf
