"""Values with derivatives that were not recorded while they were computed.

`attach` is the one place where this package speaks of autograd: `unroll` attaches to the end of a segment the derivative of
running it again, and `implicit` to a solution that of the equation it solves. The values are computed first, cut from their
past, so that it does not matter how. Then they are attached to what they depend on, by a *rule*.

A rule is two functions: from the cotangents of the values to those of what they depend on, and from tangents to tangents.
Both are made of ordinary operations, and can be differentiated, batched and nested.

What a function depends on is not only what it is given: a loss may close over the parameters of another network. `watched`
finds the tensors that an operation meets and nobody has passed, and `exchanged` puts others in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef

from purestep import maths


@dataclass(frozen=True)
class Rule:  # no NamedTuple: torch would see a pytree of two functions in it
    """The derivatives of values with respect to the tensors they depend on, all in flat lists."""

    pull: Callable[[list[Tensor], list[Tensor], list[Tensor]], Sequence[Tensor | None]]
    """(values, sources, cotangents of the values) -> cotangents of the sources."""
    push: Callable[[list[Tensor], list[Tensor], list[Tensor]], Sequence[Tensor]]
    """(values, sources, tangents of the sources) -> tangents of the values."""


def attach(values: Sequence[Tensor], sources: Sequence[Tensor], rule: Rule) -> list[Tensor]:
    """The same values, as functions of `sources`; a `rule` knows their derivatives. Values are floating-point or complex."""
    if not values or not (maths.transforming() or (torch.is_grad_enabled() and any([x.requires_grad for x in sources]))):
        return list(values)
    if sum([level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ()]) > 1:
        raise RuntimeError(  # torch would drop the mixed term without a word
            "Forward-mode differentiation of forward-mode differentiation does not pass through torch.autograd.Function, which "
            "unroll(checkpoint_every=...) and implicit are made of. Take one of the two derivatives in reverse: "
            "torch.func.grad, jacrev or vjp in place of jvp or jacfwd."
        )
    return list(_Attached.apply(rule, len(values), *values, *sources))  # type: ignore[no-untyped-call]


class _Attached(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rule: Rule, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([x.clone() for x in tensors[:count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rule, count, *tensors = inputs
        ctx.rule, ctx.count = rule, count
        ctx.save_for_backward(*output, *tensors[count:])
        ctx.save_for_forward(*output, *tensors[count:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        values, sources = saved[: ctx.count], saved[ctx.count :]
        return (None, None, *[None] * ctx.count, *ctx.rule.pull(values, sources, list(cotangents)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        saved = list(ctx.saved_tensors)
        values, sources = saved[: ctx.count], saved[ctx.count :]
        given = [torch.zeros_like(x) if t is None else t for x, t in zip(sources, tangents[2 + ctx.count :])]
        return tuple(ctx.rule.push(values, sources, given))


def pullback(function: Callable[[list[Tensor]], Sequence[Tensor]], at: list[Tensor], cotangents: list[Tensor]) -> list[Any]:
    """The cotangents of a list, of a function of it; None for whole numbers."""
    places, of_floats = floats(function, at)
    _, back = torch.func.vjp(of_floats, *[at[k] for k in places])  # type: ignore[misc]
    found: list[Any] = [None] * len(at)
    for k, x in zip(places, back(tuple(cotangents))):
        found[k] = x
    return found


def pushforward(function: Callable[[list[Tensor]], Sequence[Tensor]], at: list[Tensor], tangents: list[Tensor]) -> list[Any]:
    """The tangents of the values of a function of a list."""
    places, of_floats = floats(function, at)
    return list(torch.func.jvp(of_floats, tuple([at[k] for k in places]), tuple([tangents[k] for k in places]))[1])


def floats(function: Callable[[list[Tensor]], Sequence[Tensor]], at: list[Tensor]) -> tuple[list[int], Callable[..., Any]]:
    """Which of a function's arguments are not whole numbers, and the function of these alone."""
    places = [k for k, x in enumerate(at) if x.is_floating_point() or x.is_complex()]

    def of_floats(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(at)
        for k, x in zip(places, xs):
            filled[k] = x
        return tuple(function(filled))

    return places, of_floats


# ------------------------------------------------------------------------------------------------- what a function closes over


def within(arguments: Any) -> Iterator[Tensor]:
    """The tensors among the arguments of an operation."""
    for x in arguments:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from within(x)


class watched(TorchFunctionMode):  # noqa: N801  (it is used as a verb)
    """Notes the tensors that operations meet, that are followed, and that are none of `given`."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        self.known = {id(x) for x in self.given}
        self.met: dict[int, TensorWeakRef] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in within((*args, *kwargs.values()) if kwargs else args):
            if id(x) not in self.known and (id(x) not in self.met or self.met[id(x)]() is not x) and maths.followed(x):
                self.met[id(x)] = TensorWeakRef(x)
        return func(*args, **kwargs or {})

    def found(self, results: Any) -> list[Tensor]:
        """What they were: those that are still there, and are no results. What was made on the way is gone by then."""
        own = {id(x) for x in pytree.tree_leaves(results) if isinstance(x, Tensor)}
        alive = [ref() for ref in self.met.values()]
        return [x for x in alive if x is not None and id(x) not in own]


class exchanged(TorchFunctionMode):  # noqa: N801
    """Operations that would meet one of `olds` are given the one of `news` that takes its place."""

    def __init__(self, olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
        super().__init__()
        self.olds = list(olds)  # alive, so that no other tensor can have their identity
        self.places = {id(old): new for old, new in zip(olds, news)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self.put(args), **dict(zip(kwargs, self.put(tuple(kwargs.values())))) if kwargs else {})

    def put(self, x: Any) -> Any:
        """The same arguments, with others in these places."""
        if isinstance(x, Tensor):
            return self.places.get(id(x), x)
        if type(x) in (tuple, list):
            return type(x)([self.put(y) for y in x])
        return x
