"""Values: a declared function together with the arguments it was given.

An optimizer and a schedule are both of this kind. A value is frozen, prints as the call that makes it, compares and
pickles by its arguments, and is a pytree whose leaves are its hyperparameters; its switches and the function itself are
the pytree's structure. Which arguments are hyperparameters is read off the declaration, never off what was given, so that
two values made by the same call with other numbers always have the same structure.
"""

from __future__ import annotations

import functools
import inspect
import operator
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from purestep._core import maths
from purestep._core.hyper import (
    Extra,
    ExtraTree,
    Interval,
    anywhere,
    check,
    check_arrays,
    check_steps,
    interval_of,
    is_arrays,
    whole_of,
)
from purestep._core.torch_api import GetAttrKey, is_batched, register_pytree_node

V = TypeVar("V", bound="Value")


class Declaration:
    """A function whose calls are values: its name, its hyperparameters (in order), its switches."""

    def __init__(self, function: Callable[..., Any], given: int, name: str = "", inner: type | None = None) -> None:
        """`given` positional arguments of `function` are supplied by the library when it runs, the rest by the user.

        An argument annotated `inner` is another value, which this one is put around.
        """
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())[given:]
        self.extras = tuple(p.name for p in parameters if hints.get(p.name) in (Extra, ExtraTree))
        self.trees = tuple(name for name in self.extras if hints[name] == ExtraTree)
        self.inner = next((p.name for p in parameters if inner is not None and hints.get(p.name) is inner), "")
        parameters = [p for p in parameters if p.name not in self.extras]
        self.function = function
        self.ours = maths.is_ours(function)
        self.name = name or function.__name__
        self.signature = inspect.Signature(parameters)
        self.intervals: dict[str, Interval | tuple[Interval, ...]] = {}
        for p in parameters:
            interval = interval_of(hints.get(p.name))
            if interval is not None:
                self.intervals[p.name] = interval
        self.arrays = tuple([p.name for p in parameters if is_arrays(hints.get(p.name))])  # pytrees of tensors
        self.hypers = tuple([p.name for p in parameters if p.name in self.intervals or p.name in self.arrays])
        wholes = {p.name: whole_of(hints.get(p.name)) for p in parameters}
        self.steps = {name: whole for name, whole in wholes.items() if whole is not None}
        self.switches = tuple(p.name for p in parameters if p.name not in self.hypers and p.name != self.inner)
        self.order = tuple(p.name for p in parameters if p.name != self.inner)  # of the arguments of a value
        self.positional = frozenset(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.factory: Callable[..., Any] | None = None

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call, defaults filled in and hyperparameters checked."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            plain = [p.replace(annotation=p.empty) for p in self.signature.parameters.values()]
            raise TypeError(f"{self.name}{inspect.Signature(plain)}: {error}.") from None
        bound.apply_defaults()
        return {name: self.checked(name, value) for name, value in bound.arguments.items()}

    def checked(self, name: str, value: Any, strict: bool = True) -> Any:
        """`value`, if it may be this argument; numbers become floats and functions of the step become schedules.

        Without `strict` a number may be outside its interval.
        """
        if name in self.steps:
            return check_steps(value, f"{self.name}: {name}", self.steps[name])
        if name in self.arrays:
            return check_arrays(value, f"{self.name}: {name}")
        interval = self.intervals.get(name)
        if not strict and interval is not None:
            interval = tuple(map(anywhere, interval)) if isinstance(interval, tuple) else anywhere(interval)
        return value if interval is None else check(value, interval, f"{self.name}: {name}", as_schedule)

    def __repr__(self) -> str:
        return self.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.attrgetter("declaration"), (self.factory,)  # found again by the factory's own import path


class Value:
    """A declared function and its arguments, frozen."""

    __slots__ = ("__weakref__", "arguments", "declaration")
    declaration: Declaration
    arguments: Mapping[str, Any]

    def __init__(self, declaration: Declaration, arguments: Mapping[str, Any]) -> None:
        object.__setattr__(self, "declaration", declaration)
        object.__setattr__(self, "arguments", arguments)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{self.declaration.name} is frozen: make a new one with replace({name}=...).")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self.declaration.name} is frozen: its {name!r} cannot be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.declaration, dict(self.arguments))

    def __repr__(self) -> str:
        return call_of(self.declaration, self.arguments)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or not isinstance(other, Value):
            return NotImplemented
        if self.declaration is not other.declaration:
            return False
        return all(same(a, other.arguments[name]) for name, a in self.arguments.items())

    def __hash__(self) -> int:
        return hash(getattr(self, "declaration", None))  # torch.compile hashes one that it has not filled yet (2.9)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_pytree_node(
            cls,
            _flatten,
            functools.partial(_unflatten, cls),
            serialized_type_name=f"purestep.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )


def _flatten(value: Value) -> tuple[list[Any], tuple[Any, ...]]:
    d, a = value.declaration, value.arguments
    return [*map(a.__getitem__, d.hypers)], (d, *map(a.__getitem__, d.switches))


def _flatten_with_keys(value: Value) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    children, context = _flatten(value)
    keys = value.declaration.hypers
    return [(GetAttrKey(k), child) for k, child in zip(keys, children)], context


def _unflatten(cls: type[V], children: Iterable[Any], context: tuple[Any, ...]) -> V:
    d, *switches = context
    arguments = dict(zip(d.hypers, children))
    arguments.update(zip(d.switches, switches))
    return cls(d, dict(zip(d.order, map(arguments.__getitem__, d.order))))


def factory_of(declaration: Declaration, make: Callable[..., Any], kind: str = "Transform") -> Any:
    """The factory that makes values of this declaration: `make(declaration, arguments)`, with the arguments checked."""

    @functools.wraps(declaration.function)
    def factory(*args: Any, **kwargs: Any) -> Any:
        return make(declaration, declaration.bind(args, kwargs))

    signature = declaration.signature.replace(return_annotation=kind)
    factory.__signature__ = signature  # type: ignore[attr-defined]
    factory.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {"return": kind}
    factory.declaration = declaration  # type: ignore[attr-defined]
    del factory.__wrapped__  # inspect and doctest would see the function, with what the library supplies
    declaration.factory = factory
    return factory


class Schedule(Value):
    """A hyperparameter that changes: called with the 0-based number of the update, an int or a 0-d tensor.

    A number of a schedule may itself be a schedule, which is called with the same step. Whole numbers in a tensor are
    converted to the precision that numbers are computed in.
    """

    __slots__ = ()

    def __call__(self, step: Any) -> Any:
        if isinstance(step, Tensor) and not step.is_floating_point():
            step = step.to(maths.precise(step.device))
        hypers = self.declaration.intervals
        return self.declaration.function(step, **{n: at(x, step) if n in hypers else x for n, x in self.arguments.items()})

    @property
    def hyperparams(self) -> dict[str, Any]:
        """Its hyperparameters by name.

        >>> import purestep as ps
        >>> ps.schedules.linear(1.0, 0.5, total_steps=10).hyperparams
        {'start': 1.0, 'end': 0.5}
        """
        return {name: self.arguments[name] for name in self.declaration.hypers}

    def replace(self, **changes: Any) -> Schedule:
        """A new schedule with these arguments, which are checked; this one is untouched.

        >>> import purestep as ps
        >>> ps.schedules.linear(1.0, 0.0, total_steps=10).replace(end=0.5, total_steps=20)
        linear(1.0, 0.5, total_steps=20)

        Args:
            **changes: the new values, by the names of the arguments of the factory.

        Raises:
            TypeError: there is no such argument.
            ValueError: the new arguments do not go together, or one is outside its range.
        """
        unknown = sorted(changes.keys() - self.arguments.keys())
        if unknown:
            raise TypeError(
                f"There is no {unknown[0]!r} to replace in {self!r}; its names are {', '.join(map(repr, self.arguments))}."
            )
        assert self.declaration.factory is not None
        return self.declaration.factory(**{**self.arguments, **changes})


def at(x: Any, step: Any) -> Any:
    """A hyperparameter at a step: a schedule's value, and anything else as it is."""
    return x(step) if isinstance(x, Schedule) else x


def as_schedule(function: Callable[[Any], Any]) -> Schedule:
    """A schedule from any function of the step."""
    return function if isinstance(function, Schedule) else Schedule(FUNCTION, {"function": function})


def _function(step: Any, function: Callable[[Any], Any]) -> Any:
    if not isinstance(step, Tensor) or torch.compiler.is_compiling() or not is_batched(step):
        return function(step)
    try:
        return function(step)
    except RuntimeError as error:
        raise TypeError(
            f"The schedule {show(function)} cannot be called under vmap, where each member has a step of its own: it may not "
            f"ask for its value (float(), int(), 'if', .item()). Compute with the tensor instead, with torch's functions or "
            f"purestep.where. torch says: {error}"
        ) from error


FUNCTION = Declaration(_function, given=1, name="schedule")
FUNCTION.factory = as_schedule
as_schedule.declaration = FUNCTION  # type: ignore[attr-defined]  # where pickle finds it again


def same(a: Any, b: Any) -> bool:
    """Equality of arguments, for which two tensors are equal when their dtypes, shapes and values are."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a is b or (a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    return bool(a == b)


def call_of(d: Declaration, arguments: Mapping[str, Any]) -> str:
    """The call that makes a value."""
    shown = [show(v) if n in d.positional else f"{n}={show(v)}" for n, v in arguments.items()]
    return f"{d.name}({', '.join(shown)})"


def show(x: Any) -> str:
    """An argument as it stands in a repr: a 0-d tensor by its value, a function by its name."""
    if isinstance(x, tuple):
        return f"({', '.join(map(show, x))}{',' if len(x) == 1 else ''})"
    if callable(x) and hasattr(x, "__qualname__"):
        return str(x.__qualname__)
    return repr(x)
