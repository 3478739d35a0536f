"""Transforms made of others: chains, and transforms that wrap another."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from typing_extensions import Self

from purestep._core.masks import Not
from purestep._core.primitives import (
    Link,
)
from purestep._core.torch_api import SequenceKey, register_pytree_node
from purestep._core.values import call_of, show
from purestep.transform import Single, Transform

PyTree = Any


def fill(made: Composite, children: tuple[Any, ...], context: Any) -> None:
    """Set the attributes of a new composite."""
    write = object.__setattr__
    write(made, "children", children)
    write(made, "context", context)
    write(made, "_links", None)
    write(made, "_plan", None)
    write(made, "_structure", None)


def unflattened(cls: Any, children: Iterable[Any], context: Any) -> Any:
    """A composite of what a pytree function left in its children's place, which may be anything."""
    made: Composite = object.__new__(cls)
    fill(made, tuple(children), context)
    return made


def links_of(child: Transform) -> tuple[Link, ...]:
    """The links of a part of a composite. A transform that is its own only link is that link: its plan does not hold these."""
    return (Link(child),) if isinstance(child, Single) else child.links


class Composite(Transform):
    """A transform made of others, given by its children and by what is not a transform."""

    __slots__ = ("__weakref__", "_links", "_plan", "_structure", "children", "context")
    children: tuple[Transform, ...]
    context: tuple[Any, ...]
    freezes: Any = None
    """The mask of parameters that nothing else in the same chain acts on."""

    def __init__(self, children: Iterable[Transform], context: tuple[Any, ...] = ()) -> None:
        fill(self, tuple(children), context)

    @property
    def links(self) -> tuple[Link, ...]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the children, in order."""
        if self._links is not None:
            return self._links
        made = self._linked()
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_links", made)
        return made

    def _linked(self) -> tuple[Link, ...]:
        found: list[Link] = []
        for child in self.children:
            found += links_of(child)
        return tuple(found)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A transform is frozen: make a new one with replace({name}=...).")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.children == other.children and self.context == other.context

    def __hash__(self) -> int:
        return hash((type(self), self.children))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.children, self.context)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_pytree_node(
            cls,
            lambda x: (list(x.children), x.context),
            functools.partial(unflattened, cls),
            serialized_type_name=f"purestep.{cls.__qualname__}",
            flatten_with_keys_fn=lambda x: (  # pyright: ignore[reportArgumentType]
                [(SequenceKey(i), c) for i, c in enumerate(x.children)],
                x.context,
            ),
        )

    def _rebuild(self, primitives: Any) -> Self:
        return type(self)([child._rebuild(primitives) for child in self.children], self.context)

    def __repr__(self) -> str:
        return f"{type(self).__name__.lower()}({', '.join([*map(repr, self.children), *map(show, self.context)])})"


class Nested(Composite):
    """A transform put around another: its own arguments, and the other; declared with `nested`."""

    __slots__ = ()

    def _linked(self) -> tuple[Link, ...]:
        own, inner = self.children
        return links_of(own)[0]._replace(span=len(inner.links)), *links_of(inner)

    def _split(self, state: Any) -> list[Any]:
        own, inner = self.children
        expected = own.links[0].transform.declaration.state
        if type(state) is not expected:
            return [state, *inner.links]  # refused by its name
        return [state, *inner._split(state.inner)]

    def _join(self, states: Sequence[Any]) -> Any:
        return states[0]._replace(inner=self.children[1]._join(states[1:]))

    def __repr__(self) -> str:
        own, inner = self.children
        value = own.links[0].transform
        d = value.declaration
        return call_of(d, {n: inner if n == d.inner else value.arguments[n] for n in d.signature.parameters})


class Chain(Composite):
    """Transforms one after the other; made with `chain`."""

    __slots__ = ()

    def _linked(self) -> tuple[Link, ...]:
        frozen = [Not(c.freezes) for c in self.children if isinstance(c, Composite) and c.freezes is not None]
        if not frozen:
            return super()._linked()
        links = []
        for child in self.children:
            others = () if isinstance(child, Composite) and child.freezes is not None else frozen
            links += [link._replace(masks=(*link.masks, *others)) for link in links_of(child)]
        return tuple(links)

    def _split(self, state: Any) -> list[Any]:
        if not isinstance(state, tuple) or hasattr(state, "_fields") or len(state) != len(self.children):
            raise TypeError(
                f"The state of a chain of {len(self.children)} must be a tuple of {len(self.children)} states, but got "
                f"{type(state).__name__}{f' of {len(state)}' if isinstance(state, tuple) else ''}. A state belongs to the "
                "transform whose init_state made it."
            )
        found: list[Any] = []
        for child, x in zip(self.children, state):
            found += (x,) if isinstance(child, Single) else child._split(x)
        return found

    def _join(self, states: Sequence[Any]) -> Any:
        parts, start = [], 0
        for child in self.children:
            if isinstance(child, Single):
                parts.append(states[start])
                start += 1
                continue
            parts.append(child._join(states[start : start + len(child.links)]))
            start += len(child.links)
        return tuple(parts)


def chain(*transforms: Transform) -> Chain:
    """Apply transforms one after the other: each takes the updates of the one before it.

    Its state is a tuple with one entry per transform. A chain within a chain is the same as its transforms written out,
    so `chain(a, chain(b, c)) == chain(a, b, c)`; a chain of nothing leaves the gradients as they are.

    >>> import purestep as ps
    >>> ps.chain(ps.clip_by_global_norm(1.0), ps.adam(lr=0.1).replace(weight_decay=0.5))
    chain(clip_by_global_norm(1.0), add_decayed_weights(0.5), scale_by_adam(betas=(0.9, 0.999), eps=1e-08), \
scale_by_learning_rate(0.1))

    Args:
        *transforms: the transforms, the first of which takes the gradients.

    Raises:
        TypeError: an argument is not a transform.
    """
    children: list[Transform] = []
    for i, t in enumerate(transforms):
        if not isinstance(t, Transform):
            hint = f" Did you mean to call it: {t.__name__}(...)?" if hasattr(t, "declaration") else ""
            raise TypeError(f"chain takes transforms, but argument {i} is {t!r}.{hint}")
        children += t.children if isinstance(t, Chain) else [t]
    return Chain(children)
