"""What a transform is made of: links, each a declared function with the state that it keeps.

A state is a named tuple, and the annotations of its fields say what they are: like the parameters, a number for each of
them, or something else. All that is said about a state elsewhere is read off these.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from purestep._core import maths, sharded
from purestep._core.cache import DECLARATIONS, DERIVED, Shared
from purestep._core.hyper import Hyper
from purestep._core.maths import Encoded, Scalar
from purestep._core.torch_api import tree_leaves
from purestep._core.values import Declaration, Schedule, Value

Sparse: TypeAlias = Literal["rows", "dense"] | None


class EmptyState(NamedTuple):
    """The state of a transform that needs none."""


class ScheduleState(NamedTuple):
    """The state of a transform that needs none but for a schedule among its hyperparameters."""

    step: Scalar  # updates so far


FieldKind: TypeAlias = Literal["like", "scalar", "encoded", "other"]


class FieldSpec(NamedTuple):
    """What one field of a state is."""

    name: str
    kind: FieldKind
    """``like``: a tensor of the parameter's shape and dtype; ``scalar``: a number; ``encoded``: a tensor in its own dtype."""
    per_param: bool = True  # there is one for each parameter; else the field belongs to a whole transform
    optional: bool = False  # some parameters may lack it


class Fields:
    """The fields of a state, in order; what is asked of them in a loop is there as a tuple with one entry for each."""

    __slots__ = ("columns", "counts", "encoded", "leaves", "like", "names", "optional", "scalars", "specs", "step", "tensors")

    def __init__(self, *specs: FieldSpec) -> None:
        self.specs = specs
        self.names = tuple([s.name for s in specs])
        self.scalars = tuple([s.kind == "scalar" for s in specs])
        self.like = tuple([s.kind == "like" for s in specs])
        self.encoded = tuple([s.kind == "encoded" for s in specs])
        self.leaves = tuple([s.per_param for s in specs])
        self.optional = any([s.optional for s in specs])
        self.step = self.names.index("step") if "step" in self.names else -1  # the position of the counter
        self.tensors = tuple([f for f, s in enumerate(specs) if s.kind == "like"])  # the positions of these
        own = [f for f, s in enumerate(specs) if not s.per_param]  # of a whole transform
        self.counts = tuple([f for f in own if specs[f].kind == "scalar" or specs[f].name.endswith("step")])  # its counters
        self.columns = tuple([f for f, s in enumerate(specs) if s.kind != "scalar"])  # of what is more than a number


_serial = itertools.count()


class LinkDeclaration(Declaration):
    """A declared transform: its function, the type of its state, what switches it off, and which parameters it refuses."""

    def __init__(
        self,
        function: Callable[..., Any],
        state: Any = None,
        *,
        off: str | None = None,
        whole: bool = False,
        moves: bool = False,
        scales: bool = False,
        requires: Callable[[str, Tensor], None] | None = None,
        sparse: Sparse = None,
        name: str = "",
        inner: type | None = None,
        passes: bool = False,
        elementwise: bool = False,
    ) -> None:
        super().__init__(function, given=3 if state is not None or whole else 2, name=name, inner=inner)
        self.key, self.watched = str(next(_serial)), False  # torch.compile takes an int for a number that may change
        DECLARATIONS[self.key] = self
        self.state, self.off, self.whole, self.requires, self.sparse = state, off, whole, requires, sparse
        self.original = self  # what a kernel knows the mathematics by
        self.derived: Shared[Any, Any] = Shared(DERIVED)  # other declarations of the same transform, by what they differ in
        self.state_dtype: torch.dtype | None = None  # that the state has at least; see `state_dtype`
        if self.trees and sparse == "rows":
            raise TypeError(
                f"{self.name} cannot have sparse='rows', because its argument {self.trees[0]} holds whole tensors, and no rows."
            )
        self.moves = moves  # a whole transform that returns new parameters instead of updates
        self.scales = scales  # one that returns the number that the updates are to be multiplied by
        self.elementwise = elementwise  # a whole transform that is right on a part of the parameters, too
        self.passes = passes  # a nested transform that returns the updates of its inner transform as they came
        self.drops = False  # whether a leafwise transform gives the same updates whatever comes in; see `drops`
        self.forwards: Callable[[Mapping[str, Any]], bool] | None = None  # see `forwards`
        self.unrolls: Callable[[Mapping[str, Any]], bool] | None = None  # see `unrolls`
        self.fields = Fields() if state is None else inspect_state(state, whole)
        self.init_names: tuple[str, ...] = ()
        if state is not None and is_global(state):  # another class cannot be saved
            torch.serialization.add_safe_globals([state])  # it holds what its annotations say: torch.load may make it
        if state is not None and bool(inner) is bool(self.inner):
            given = list(inspect.signature(state.init).parameters.values())[2 if self.inner else 1 :]
            self.init_names = tuple([p.name for p in given if p.kind is not p.VAR_KEYWORD])
            unknown = [n for n in self.init_names if n not in self.signature.parameters]
            if unknown:
                raise TypeError(
                    f"The init of {state.__name__} asks for {unknown[0]!r}, which is no argument of {self.name}: it may ask "
                    f"for {', '.join(map(repr, self.order)) or 'nothing'}."
                )


def is_global(state: type) -> bool:
    """Whether a class is found by its name, as a file names it."""
    name = state.__qualname__
    if "." in name:  # the class around it is not there yet
        return "<locals>" not in name
    return getattr(sys.modules.get(state.__module__), name, None) is state


torch.serialization.add_safe_globals([EmptyState, ScheduleState])

Factory = TypeVar("Factory")


def drops(factory: Factory) -> Factory:
    """A factory of leafwise transforms whose updates are the same, whatever gradients come in."""
    typing.cast("Any", factory).declaration.drops = True
    return factory


def forwards(when: Callable[[Mapping[str, Any]], bool]) -> Callable[[Factory], Factory]:
    """A factory of nested transforms that keep nothing of a gradient that the inner transform drops, and move nothing by it.

    Args:
        when: a function of the arguments of such a transform that says whether this holds for it.
    """

    def mark(factory: Factory) -> Factory:
        typing.cast("Any", factory).declaration.forwards = when
        return factory

    return mark


def inspect_state(state: Any, whole: bool) -> Fields:
    """Read the fields of a state off its annotations."""
    hints = typing.get_type_hints(state, include_extras=True)
    names = [n for n in state._fields if n != "inner"]  # which is the states of other links
    return Fields(*[inspect_field(n, hints[n], whole) for n in names])


def inspect_field(name: str, hint: Any, whole: bool) -> FieldSpec:
    """What the annotation of a field says."""
    kinds: dict[FieldKind, Any] = {"scalar": Scalar, "like": Tensor, "encoded": Encoded}
    kind: FieldKind = "other"
    for found, expected in kinds.items():
        if hint == expected or (hint == expected | None and found != "scalar"):
            kind = found
    per_param = typing.get_origin(hint) is list if whole else True
    return FieldSpec(name, kind, per_param, type(None) in typing.get_args(hint))


def scaled(u: Tensor, p: Tensor, factor: Hyper) -> Tensor:
    """What a whole transform that scales leaves to the leafwise ones that follow it."""
    return u * factor


SCALED = LinkDeclaration(scaled)


def unrolls(when: Callable[[Mapping[str, Any]], bool]) -> Callable[[Factory], Factory]:
    """A factory of transforms whose step `torch.compile` leaves out of its graph, because it would write long loops out.

    Args:
        when: a function of the arguments of such a transform that says whether this holds for it.
    """

    def mark(factory: Factory) -> Factory:
        typing.cast("Any", factory).declaration.unrolls = when
        return factory

    return mark


class Primitive(Value):
    """A transform that is not made of others."""

    __slots__ = ()
    declaration: LinkDeclaration  # pyright: ignore[reportIncompatibleVariableOverride]


def refuse_schedules(value: Primitive) -> None:
    """Refuse a schedule among the hyperparameters of a transform whose state does not count its updates."""
    d: Any = value.declaration
    if scheduled(value):
        raise TypeError(
            f"{d.name} cannot follow a schedule, because {d.state.__name__} does not count its updates; "
            "add the field 'step: Scalar' to it, begun with counter(p)."
        )


class Link(NamedTuple):
    """One transform of a chain, and the masks it stands under, the outermost last."""

    transform: Primitive
    masks: tuple[Any, ...] = ()
    span: int = 0  # how many of the links that follow it is put around


Kinds: TypeAlias = tuple[Any, ...]
"""For each hyperparameter: "number", "zero" (a number that switches the transform off), "tensor", "device" (a tensor that is
not on the CPU), "schedule", "device schedule" (one with such a tensor), None, or the kinds of a tuple."""


def kinds_of(value: Primitive) -> Kinds:
    """What the hyperparameters are, in order; numbers are left out."""
    d, a = value.declaration, value.arguments
    found: list[Any] = []
    for name in d.hypers:
        x = a[name]
        if isinstance(x, float):
            found.append("zero" if x == 0.0 and name == d.off else "number")
        elif type(x) is Tensor:
            found.append("tensor" if x.is_cpu else "device")
        elif type(x) is tuple and {*map(type, x)} == {float}:
            found.append(("number",) * len(x))
        else:
            found.append(None if x is None else kind_of(x))
    return tuple(found)


def kind_of(x: Any) -> Any:
    """What one hyperparameter is: see `Kinds`."""
    if isinstance(x, tuple):
        return ("number",) * len(x) if {*map(type, x)} == {float} else tuple(map(kind_of, x))
    if isinstance(x, Tensor):
        return "tensor" if x.is_cpu else "device"
    if isinstance(x, Schedule):
        tensors = [y for y in tree_leaves(x) if isinstance(y, Tensor)]
        return "schedule" if all([y.is_cpu for y in tensors]) else "device schedule"
    if x is None:
        return None
    return "number" if isinstance(x, float) else type(x)


def state_type(value: Primitive) -> type:
    """The type of a transform's state."""
    if value.declaration.state is not None:
        return value.declaration.state
    return ScheduleState if scheduled(value) else EmptyState


def fields_of(value: Primitive) -> Fields:
    """What the fields of a transform's state are."""
    if value.declaration.state is not None:
        return value.declaration.fields
    if not scheduled(value):
        return EMPTY
    return SCHEDULED_WHOLE if value.declaration.whole else SCHEDULED


EMPTY = Fields()
SCHEDULED = Fields(FieldSpec("step", "scalar"))
SCHEDULED_WHOLE = Fields(FieldSpec("step", "scalar", per_param=False))


def scheduled(value: Primitive) -> bool:
    """Whether any hyperparameter is a schedule."""
    a = value.arguments
    for name in value.declaration.hypers:
        x = a[name]
        if isinstance(x, Schedule) or (isinstance(x, tuple) and any([isinstance(y, Schedule) for y in x])):
            return True
    return False


def users(x: Any) -> bool:
    """Whether an argument calls a function of a user's, which may raise what it likes."""
    if isinstance(x, Schedule):
        return not x.declaration.ours or any(map(users, x.arguments.values()))
    if isinstance(x, (tuple, list)):
        return any(map(users, x))
    return callable(x) and not isinstance(x, (Value, type, Tensor))


def is_off(value: Primitive) -> bool:
    """Whether a transform does nothing: its strength is the plain number 0. A tensor may be 0, but is never off."""
    off = value.declaration.off
    if off is None:
        return False
    strength = value.arguments[off]
    return isinstance(strength, float) and strength == 0.0


def fresh_whole_state(value: Primitive, params: list[Tensor]) -> Sequence[Any]:
    """The state of a whole transform before its first update, with lists for what it keeps per parameter."""
    d = value.declaration
    params = [as_begun(d, p) for p in params]
    if d.state is not None:
        asked = asked_for(value)
        state: Sequence[Any] = d.state.init(params, None, **asked)[:-1] if d.inner else d.state.init(params, **asked)
        return state
    return [maths.counter(params[0] if params else torch.zeros(()))] if scheduled(value) else []


def fresh_state(value: Primitive, p: Tensor) -> tuple[Any, ...]:
    """The state of one parameter before its first update."""
    d = value.declaration
    p = as_begun(d, p)
    if d.state is None:
        return ScheduleState(maths.counter(p)) if scheduled(value) else EmptyState()
    state: Any = d.state.init(p, **asked_for(value))
    if not sharded.is_sharded(p):
        return state
    fields = zip(state, d.fields.specs)
    return type(state)(*[sharded.spread_by_rows(x, p) if spec.kind == "other" else x for x, spec in fields])


def asked_for(value: Primitive) -> dict[str, Any]:
    """The arguments that the first state of a transform depends on."""
    d = value.declaration
    found = {name: value.arguments[name] for name in d.init_names}
    return {name: evaluated(x, None) if name in d.intervals else x for name, x in found.items()}


def as_begun(d: LinkDeclaration, p: Tensor) -> Tensor:
    """A parameter as the state of a transform begins with it."""
    if d.state_dtype is None or not p.is_floating_point():
        return p
    return p.to(torch.promote_types(p.dtype, d.state_dtype))


def evaluated(x: Any, count: Tensor | None) -> Any:
    """A hyperparameter for a leaf function: schedules called, batches refused."""
    if isinstance(x, tuple):
        return tuple([evaluated(y, count) for y in x])
    if isinstance(x, Schedule):
        return evaluated(x(0 if count is None else count), count)
    if isinstance(x, Tensor):
        single(x)
        return x.reshape(()) if x.dim() else x
    return x


def single(x: Tensor) -> None:
    """Refuse a hyperparameter that holds several values."""
    if x.dim() and x.numel() != 1:
        raise ValueError(
            f"A hyperparameter must be one number, but got a tensor of shape {tuple(x.shape)}. To train one model per value, "
            "vmap over the optimizer: torch.func.vmap(train, in_dims=(purestep.in_dims(opt), ...))(opt, ...)."
        )
