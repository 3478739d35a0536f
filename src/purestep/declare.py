"""How a transform is declared: from a function of one tensor (`leafwise`), or of all together (`whole`, `nested`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, overload

from torch import Tensor

from purestep._core.primitives import (
    LinkDeclaration,
    Sparse,
)
from purestep._core.values import factory_of
from purestep._engine.nesting import Inner
from purestep.compose import Nested, uncalled
from purestep.transform import Leafwise, Transform, Whole

P = ParamSpec("P")


S = TypeVar("S")


T = TypeVar("T")


PyTree = Any


Requires: TypeAlias = Callable[[str, Tensor], None] | None


@overload
def leafwise(
    state: type[S], *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Callable[[Callable[Concatenate[Tensor, S, Tensor, P], tuple[Tensor, S]]], Callable[P, Transform]]: ...


@overload
def leafwise(
    state: None = None, *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Callable[P, Transform]]: ...


def leafwise(
    state: Any = None, *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Any:
    """Declare a leafwise transform: a function of one parameter becomes a factory of transforms.

    The function takes the gradient (or the update so far) `g`, the parameter's state `s` and the parameter `p`, then the
    transform's arguments, and returns the new update and the new state. Without a state it takes `g` and `p` and returns
    the update. It is written out of place with operators and torch's functions; it must not branch on values (use
    `purestep.where`). Arguments annotated `Hyper` (or `float`) are hyperparameters, all others are switches. A tensor that it
    closes over is an input like any other: it is read at every step, and derivatives with respect to it are followed.

    Args:
        state: a `NamedTuple` with a classmethod `init(p, ...)`, which may ask for hyperparameters by name. A field
            annotated `Scalar` holds one number per parameter, and one called `step` counts the updates.
        off: a hyperparameter. Where it is the plain number 0, the transform does nothing and has no state.
        requires: a function `(path, param)` that raises an error for a parameter that cannot be treated. It is called
            when the state is made, before anything has changed.
        sparse: what a sparse gradient means: ``"rows"``, that only the rows it has are changed, by the same function on
            these rows; ``"dense"``, that all rows change, so it is made dense first. By default it is refused.
        name: what the transform is called where it is printed; by default the function's name.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init`; or, from the decorator, the function has an
            argument annotated `Extra` or `ExtraTree`.

    >>> import torch, purestep as ps
    >>> @ps.leafwise()
    ... def sign(g, p):
    ...     return torch.sign(g)
    >>> ps.chain(sign(), ps.scale(-0.1)).step(torch.tensor([3.0, -2.0]), (ps.EmptyState(),) * 2, torch.zeros(2))[0]
    tensor([-0.1000,  0.1000])
    """
    if state is not None and not (isinstance(state, type) and hasattr(state, "init") and hasattr(state, "_fields")):
        raise TypeError(
            f"leafwise takes a state (a NamedTuple with a classmethod init(p)) or nothing, but got {state!r}. "
            "For a transform without state write @leafwise()."
        )

    def declare(function: Any) -> Any:
        declaration = LinkDeclaration(function, state, off=off, requires=requires, sparse=sparse, name=name)
        if declaration.extras:
            raise TypeError(
                f"{declaration.name} is leafwise, so it cannot take the extra argument {declaration.extras[0]!r}. Declare it "
                "with whole()."
            )
        return factory_of(declaration, Leafwise)

    return declare


def whole(
    state: Any = None, *, moves: bool = False, scales: bool = False, sparse: Sparse = None, elementwise: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Transform]]:
    """Declare a whole transform: a function of all parameters together becomes a factory of transforms.

    The function takes the list of gradients, its state and the list of parameters, `(gs, s, ps, ...)`, then the transform's
    arguments, and returns the list of updates and the new state. Parameters without a gradient are not among them.
    Hyperparameters arrive as numbers or 0-d tensors, schedules already called.

    Args:
        state: a `NamedTuple` with a classmethod `init(params)`, which is given the list of all parameters. A field annotated
            `list[Tensor]` has an entry per parameter, like the parameter (`list[Scalar]`: one number), any other is the
            transform's own; one called `step` counts the updates, which the function does itself.
            Without a state the function is handed an `EmptyState` to return.
        moves: the function returns new parameters instead of updates. What it gives is then kept to the last bit.
        scales: the function returns, instead of updates, the number that all gradients are to be multiplied by. What follows
            in a chain does that on its way.
        sparse: as in `leafwise`; with ``"rows"`` the function is given these rows alone.
        elementwise: promises that what becomes of an element depends on what else there is in its own place, and on numbers
            that are no tensor's, and so is right on any part of the parameters: that is what a process sees of FSDP1's.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init`.

    >>> import torch, purestep as ps
    >>> @ps.whole(scales=True)
    ... def normalize(gs, s, params):
    ...     return 1 / ps.global_norm(gs), s
    >>> opt, params = normalize(), [torch.zeros(1), torch.zeros(1)]
    >>> opt.update([torch.tensor([3.0]), torch.tensor([4.0])], opt.init_state(params), params)[0]
    [tensor([0.6000]), tensor([0.8000])]
    """
    if state is not None and not (isinstance(state, type) and hasattr(state, "init") and hasattr(state, "_fields")):
        raise TypeError(f"whole takes a state (a NamedTuple with a classmethod init(params)) or nothing, but got {state!r}.")

    def declare(function: Callable[..., Any]) -> Any:
        d = LinkDeclaration(
            function, state, whole=True, moves=moves, scales=scales, sparse=sparse, elementwise=elementwise
        )  # fmt: skip
        return factory_of(d, Whole)

    return declare


def nested(
    state: Any,
    *,
    moves: bool = False,
    passes: bool = False,
    sparse: Sparse = None,
    elementwise: bool = False,
    name: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a transform that is put around another, and decides what becomes of its updates and its state.

    The function is that of a `whole` transform, with one more argument, annotated `Inner`: the other transform. Its
    `update(gs, state, params)` and `step` take and return lists, and its `when(flag, gs, state, params)` is an update where
    the flag holds, and otherwise none. Its state is the last field of the own state, and called ``inner``.

    Hyperparameters, masks, extra arguments, parameter groups and state dicts of the inner transform are seen to: they are
    those of the whole. Under `purestep.optim.Optimizer` its state is found under its usual names.

    Args:
        state: a `NamedTuple` with a classmethod `init(params, inner)`, which is given the list of all parameters, and what to
            pass on to its last field, `inner`. For the other fields see `whole`.
        moves: the function returns new parameters instead of updates. What it gives is then kept to the last bit.
        passes: promises that the function does nothing with the updates of the inner transform but return them. At the end of
            a chain the inner transform then applies them itself, with a fused kernel if there is one for it.
        sparse: as in `leafwise`.
        elementwise: as in `whole`, as far as the inner transform is.
        name: what the transform is called where it is printed; by default the function's name.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three, the other transform among them.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init` and a last field `inner`; or, from the decorator, no
            argument is annotated `Inner`.

    >>> import torch, purestep as ps
    >>> from typing import Any, NamedTuple
    >>> class HalvedState(NamedTuple):
    ...     inner: Any
    ...
    ...     @classmethod
    ...     def init(cls, params, inner):
    ...         return cls(inner)
    >>> @ps.nested(HalvedState)
    ... def halved(gs, s, params, transform: ps.Inner):
    ...     us, inner = transform.update(gs, s.inner, params)
    ...     return [u / 2 for u in us], HalvedState(inner)
    >>> opt, p = halved(ps.sgd(lr=0.1)), torch.tensor([1.0])
    >>> opt.step(torch.tensor([1.0]), opt.init_state(p), p)[0]
    tensor([0.9500])
    """
    if not (isinstance(state, type) and hasattr(state, "init") and getattr(state, "_fields", ("",))[-1] == "inner"):
        raise TypeError(
            "nested takes a state, a NamedTuple with a classmethod init(params, inner) and 'inner' as its last field, but got "
            f"{state!r}."
        )

    def declare(function: Callable[..., Any]) -> Any:
        d = LinkDeclaration(
            function, state, whole=True, moves=moves, sparse=sparse, name=name, inner=Inner, passes=passes,
            elementwise=elementwise,
        )  # fmt: skip
        if not d.inner:
            raise TypeError(
                f"{d.name} is nested, so it must take a transform, but no argument is annotated with purestep.Inner. Annotate "
                "the one that is the transform."
            )
        parameters = d.signature.parameters.values()
        d.signature = d.signature.replace(
            parameters=[p.replace(annotation=Transform) if p.name == d.inner else p for p in parameters]
        )

        def make(declaration: LinkDeclaration, arguments: dict[str, Any]) -> Nested:
            inner = arguments.pop(d.inner)
            if not isinstance(inner, Transform):
                raise TypeError(f"{d.name} wraps a transform, but {d.inner} is {inner!r}.{uncalled(inner)}")
            return Nested((Whole(declaration, arguments), inner))

        return factory_of(d, make)

    return declare
