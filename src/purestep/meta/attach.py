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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from purestep._core import maths
from purestep._core.torch_api import (
    TransformType,
    add_batch_dim,
    batch_dim_of,
    get_unwrapped,
    interpreter_stack,
    is_wrapped,
    level_of,
    maybe_current_level,
    sequence_number,
    tree_leaves,
    wrap_for_grad,
)


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
    if sum([level.key() == TransformType.Jvp for level in interpreter_stack() or ()]) > 1:
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


def pullback(
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    at: list[Tensor],
    cotangents: list[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Any]:
    """The cotangents of a list, of a function of it; None for whole numbers, and for what is not `wanted`."""
    places, of_floats = floats(function, at, wanted)
    _, back = torch.func.vjp(of_floats, *[at[k] for k in places])  # type: ignore[misc]
    found: list[Any] = [None] * len(at)
    for k, x in zip(places, back(tuple(cotangents))):
        found[k] = x
    return found


def pushforward(
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    at: list[Tensor],
    tangents: list[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Any]:
    """The tangents of the values of a function of a list; what is not `wanted` is constant."""
    places, of_floats = floats(function, at, wanted)
    return list(torch.func.jvp(of_floats, tuple([at[k] for k in places]), tuple([tangents[k] for k in places]))[1])


def floats(
    function: Callable[[list[Tensor]], Sequence[Tensor]], at: list[Tensor], wanted: Sequence[bool] | None
) -> tuple[list[int], Callable[..., Any]]:
    """Which of a function's arguments are not whole numbers, and are `wanted`; and the function of these alone."""
    places = [k for k, x in enumerate(at) if (wanted is None or wanted[k]) and (x.is_floating_point() or x.is_complex())]

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
        elif isinstance(x, dict):
            yield from within(x.values())


class Level(NamedTuple):
    """A level of `torch.func` that a tensor is wrapped for."""

    number: int
    dim: int  # that of the batch, or below 0

    def wrap(self, x: Tensor) -> Tensor:
        """A tensor as it is handed to a function on this level."""
        made: Tensor = wrap_for_grad(x, self.number)
        if self.dim >= 0:
            made = add_batch_dim(x, self.dim, self.number)
        return made


def unwrapped(x: Tensor, base: int) -> tuple[Tensor, list[Level]]:
    """A tensor without the levels above `base`, and these, the outermost first."""
    levels: list[Level] = []
    while is_wrapped(x) and level_of(x) > base:
        levels.append(Level(level_of(x), batch_dim_of(x)))
        x = get_unwrapped(x)
    return x, levels


def current_level() -> int:
    """The number of the innermost level of `torch.func`, 0 if there is none."""
    level = maybe_current_level()
    return 0 if level is None else int(level)


class watched(TorchFunctionMode):  # noqa: N801  (it is used as a verb)
    """Notes the tensors that operations meet, that are followed, and that are none of `given`.

    A transform of `torch.func` hands its arguments on in a wrapper: what counts is the tensor that was there before it began.
    """

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.waits = False  # whether what runs now is not to be differentiated
        self.given = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.known = {id(x) for x in self.given}
        self.met: dict[int, TensorWeakRef] = {}
        self.base = current_level()
        # of the next operation that is recorded:
        self.start = sequence_number()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waits:
            return func(*args, **kwargs or {})
        for y in within((*args, *kwargs.values()) if kwargs else args):
            x, _ = unwrapped(y, self.base)
            if id(x) not in self.known and (id(x) not in self.met or self.met[id(x)]() is not x) and maths.followed(x):
                self.met[id(x)] = TensorWeakRef(x)
        return func(*args, **kwargs or {})

    def found(self, results: Any) -> list[Tensor]:
        """What they were: those that are still there, and are no results. What was made on the way is gone by then."""
        own = {id(x) for x in tree_leaves(results) if isinstance(x, Tensor)}
        alive = [ref() for ref in self.met.values()]
        return [x for x in alive if x is not None and id(x) not in own]

    def refuse_unseen(self, results: Any, what: str) -> None:
        """Refuse results that depend on a tensor that no operation was seen to meet: its derivative would be lost.

        Raises:
            RuntimeError: there is one.
        """
        met = [layer for ref in self.met.values() for x in [ref()] if x is not None for layer in layers(x)]
        leaves, nodes = {id(x) for x in met}, {x.grad_fn for x in met}
        seen: set[Any] = {None}
        rest = [y.grad_fn for x in tree_leaves(results) if isinstance(x, Tensor) for y in layers(x)]
        while rest:
            node: Any = rest.pop()
            if node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)  # of a tensor that was not computed; the others are older if they were there
            if leaf is None and node._sequence_nr() >= self.start:
                rest += [n for n, _ in node.next_functions]
            elif (node not in nodes) if leaf is None else (id(leaf) not in leaves):
                of = "" if leaf is None else f" of shape {tuple(leaf.shape)}"
                raise RuntimeError(
                    f"{what} closes over a tensor{of} and hands it to code that torch's function modes do not see, such as "
                    "an extension in C++, so its derivative would be lost. Hand it over as an argument, or in its place "
                    "what an ordinary operation makes of it, such as x * 1."
                )


def layers(x: Tensor) -> list[Tensor]:
    """A tensor, and what it is wrapped around."""
    found = [x]
    while is_wrapped(found[-1]):
        found.append(get_unwrapped(found[-1]))
    return found


class exchanged(TorchFunctionMode):  # noqa: N801
    """Operations that would meet one of `olds` are given the one of `news` that takes its place.

    One that a transform of `torch.func` takes derivatives with respect to cannot be exchanged, as it will ask for that very
    tensor: the difference of the two, which is 0 but has derivatives, is added to it.
    """

    def __init__(self, olds: Sequence[Tensor], news: Sequence[Tensor]) -> None:
        super().__init__()
        self.waits = False  # whether what runs now is not to be differentiated
        self.olds = list(olds)  # alive, so that no other tensor can have their identity
        self.places = {id(old): (new, difference(old, new)) for old, new in zip(olds, news)}
        self.base = current_level()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.waits:
            return func(*args, **kwargs)
        if func is Tensor.requires_grad_:
            args = self.put(args, False)
        elif func is torch.autograd.grad:
            named = dict(zip(("outputs", "inputs", "grad_outputs"), args)) | kwargs
            args = args[3:]
            kwargs = {name: self.put(x, name != "inputs") for name, x in named.items()}
            return func(kwargs.pop("outputs"), kwargs.pop("inputs"), kwargs.pop("grad_outputs", None), *args, **kwargs)
        else:
            args, kwargs = self.put(args), self.put(kwargs)
        return func(*args, **kwargs)

    def put(self, x: Any, history: bool = True) -> Any:
        """The same arguments, with others in these places; without `history` not of those that derivatives are asked by."""
        if isinstance(x, Tensor):
            inside, levels = unwrapped(x, self.base)
            if id(inside) not in self.places:
                return x
            new, zero = self.places[id(inside)]
            if levels and not history:
                return x
            real = inside.is_floating_point() or inside.is_complex()
            sought = real and any([y.requires_grad for y, _ in zip(layers(x), levels)])
            if sought and zero is None:
                raise RuntimeError(
                    "torch.func takes derivatives by a tensor that the function it is called in closes over, and the level of "
                    "this tensor has been left (reverse over reverse). Hand x * 1 to torch.func in its place, or make it an "
                    "argument of the function."
                )
            made: Any = zero if sought else new
            for level in reversed(levels):
                made = level.wrap(made)
            return x + made if sought else made
        if type(x) in (tuple, list):
            return type(x)([self.put(y, history) for y in x])
        if type(x) is dict:
            return {k: self.put(y, history) for k, y in x.items()}
        return x


def difference(old: Tensor, new: Tensor) -> Tensor | None:
    """New less old, of two tensors with the same values: minus zero, which changes nothing that it is added to.

    None for whole numbers, and for a tensor on a level of `torch.func` that has been left.
    """
    if not (old.is_floating_point() or old.is_complex()):
        return None
    try:
        zero = old - new
    except RuntimeError:
        return None
    return torch.where(zero == zero, -zero, -0.0)  # where they are infinite it was NaN
