"""What a hyperparameter may be, and the check it passes when a transform is made.

A parameter of a leaf function whose annotation is one of the names below (or plain `float` or `Tensor`, or a tuple of
these) is a hyperparameter: a number, a 0-dimensional tensor, or a schedule, `step -> value`. Any other annotation makes it
a switch, a plain Python value that is part of the transform's structure.

Numbers are checked against the interval when the transform is made. Tensors are not: reading one would wait for the
device, and a batched one cannot be read at all.
"""

from __future__ import annotations

import itertools
import math
import numbers
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from purestep._core.torch_api import tree_leaves


@dataclass(frozen=True)
class Interval:
    """The numbers a hyperparameter may be: from `low` (excluded if `above`) to `high` (excluded if `below`).

    It may be None if `optional`, and is a tuple of any length if `several`.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    optional: bool = False
    several: bool = False

    def __contains__(self, x: object) -> bool:
        if not isinstance(x, (int, float)):
            return False
        return (self.low < x if self.above else self.low <= x) and (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a number"
        if self.high == math.inf:
            return f"a number {'above' if self.above else 'of at least'} {self.low:g}"
        return f"a number in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"


Hyper: TypeAlias = Annotated[Any, Interval()]
"""A number, a 0-d tensor, or a schedule."""

NonNegative: TypeAlias = Annotated[Any, Interval(low=0.0)]
"""A hyperparameter of at least 0."""

Fraction: TypeAlias = Annotated[Any, Interval(low=0.0, high=1.0, below=True)]
"""A hyperparameter in [0, 1): a decay rate."""

Positive: TypeAlias = Annotated[Any, Interval(low=0.0, above=True)]
"""A hyperparameter above 0."""

UnitInterval: TypeAlias = Annotated[Any, Interval(low=0.0, high=1.0)]
"""A hyperparameter in [0, 1]."""

Betas: TypeAlias = tuple[Fraction, Fraction]
"""Two decay rates."""


@dataclass(frozen=True)
class Given:
    """What is given at each update, beside the gradients: anything, or a `tree` like the parameters."""

    tree: bool = False


Extra: TypeAlias = Annotated[Any, Given()]
"""An extra argument of a whole transform: not part of the transform, but passed to each `update` and `step` by name."""

ExtraTree: TypeAlias = Annotated[Any, Given(tree=True)]
"""An `Extra` that is a pytree like the parameters: the function gets a list, with a tensor like it for each parameter.
"""


@dataclass(frozen=True)
class Whole:
    """A number of steps: a whole number of at least `low`, and part of a value's structure.

    It may be None if `optional`, and is a tuple of them, each above the one before, if `rising`.
    """

    low: int = 0
    optional: bool = False
    rising: bool = False


Steps: TypeAlias = Annotated[int, Whole()]
"""A number of steps."""

Period: TypeAlias = Annotated[int, Whole(low=1)]
"""A number of steps, one at least."""

Boundaries: TypeAlias = Annotated[tuple[int, ...], Whole(rising=True)]
"""Numbers of steps, each above the one before."""


@dataclass(frozen=True)
class Arrays:
    """A pytree of tensors of any shape."""


Weights: TypeAlias = Annotated[Any, Arrays()]
"""A pytree of tensors of any shape, such as the weights of a network that computes updates. It is a hyperparameter: it can be
replaced, differentiated, batched and saved as numbers can. A transform with one runs one parameter at a time.
"""


def several(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether an argument is a sequence of values: a tuple, a list, or what a configuration library has in their place."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def check_steps(value: Any, name: str, whole: Whole) -> Any:
    """`value` as a number of steps.

    Raises:
        ValueError: it is too small, or several do not rise.
        TypeError: it is not an integer, or not several.
    """
    if value is None and whole.optional:
        return None
    if whole.rising:
        if not several(value):
            raise TypeError(f"{name} must be a tuple of integers, but got {value!r}.")
        steps = tuple(check_steps(x, f"{name}[{k}]", Whole(whole.low)) for k, x in enumerate(value))
        if any(x >= y for x, y in itertools.pairwise(steps)):
            raise ValueError(f"{name} must rise from each to the next, but got {value!r}.")
        return steps
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer of at least {whole.low}, but got {value!r}.")
    if value < whole.low:
        raise ValueError(f"{name} must be an integer of at least {whole.low}, but got {value!r}.")
    return int(value)


def whole_of(annotation: Any) -> Whole | None:
    """What an annotation asks of a number of steps, or None if it is for something else."""
    return next((x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Whole)), None)


def is_arrays(annotation: Any) -> bool:
    """Whether an annotation is `Weights`."""
    return any([isinstance(x, Arrays) for x in getattr(annotation, "__metadata__", ())])


def check_arrays(value: Any, name: str) -> Any:
    """`value`, if it is a pytree of tensors.

    Raises:
        TypeError: it is not, or holds no tensor.
    """
    leaves = tree_leaves(value)
    odd = [x for x in leaves if not isinstance(x, Tensor)]
    if odd or not leaves:
        found = f"it holds {odd[0]!r}" if odd else f"{value!r} holds none"
        raise TypeError(f"{name} must be a pytree of tensors, such as dict(network.named_parameters()), but {found}.")
    return value


def interval_of(annotation: Any) -> Interval | tuple[Interval, ...] | None:
    """The interval an annotation stands for, a tuple of them for a tuple, or None for a switch."""
    if annotation is float or annotation is Tensor or annotation == float | Tensor:
        return Interval()
    if typing.get_origin(annotation) is Annotated:
        return next((x for x in typing.get_args(annotation) if isinstance(x, Interval)), None)
    if typing.get_origin(annotation) is tuple:
        first, *others = typing.get_args(annotation)
        if others == [...]:
            several = interval_of(first)
            return replace(several, several=True) if isinstance(several, Interval) else None
        parts = [interval_of(x) for x in typing.get_args(annotation)]
        if parts and all(isinstance(x, Interval) for x in parts):
            return tuple(typing.cast("list[Interval]", parts))
    return None


def anywhere(interval: Interval) -> Interval:
    """The same kind of hyperparameter, with any number."""
    return Interval(optional=interval.optional, several=interval.several)


def check(value: Any, interval: Interval | tuple[Interval, ...], name: str, schedule: Callable[[Any], Any]) -> Any:
    """`value` as the engine keeps it, or an error that says what `name` may be; `schedule` takes functions of the step.

    Raises:
        ValueError: a number outside its interval (NaN is outside all), or a tuple of the wrong length.
        TypeError: neither a number nor a floating-point tensor nor a function of the step.
    """
    if isinstance(interval, tuple):
        if not several(value) or len(value) != len(interval):
            raise ValueError(f"{name} must be {len(interval)} numbers, but got {value!r}.")
        return tuple(check(x, i, f"{name}[{k}]", schedule) for k, (x, i) in enumerate(zip(value, interval)))
    if interval.several:
        if not several(value):
            raise TypeError(f"{name} must be a tuple, but got {value!r}.")
        return tuple(check(x, replace(interval, several=False), f"{name}[{k}]", schedule) for k, x in enumerate(value))
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be {interval}, but got a tensor of dtype {value.dtype}.")
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
        if number not in interval:
            raise ValueError(f"{name} must be {interval}, a 0-d tensor or a schedule, but got {value!r}.")
        return number
    if value is None and interval.optional:
        return None
    if callable(value) and not isinstance(value, type):
        return schedule(value)
    raise TypeError(f"{name} must be {interval}, a 0-d tensor or a schedule (step -> value), but got {value!r}.")
