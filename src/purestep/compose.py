"""Transforms made of others: chains, and transforms that wrap another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from typing_extensions import Self

from purestep._core.masks import Not
from purestep._core.primitives import Link, Primitive
from purestep._core.torch_api import SequenceKey, register_pytree_node
from purestep._core.values import call_of, show
from purestep._engine.plan import structure_of
from purestep.transform import Single, Transform

PyTree = Any


def fill(made: Composite, children: tuple[Any, ...], context: Any) -> None:
    """Set the attributes of a new composite. Nothing is set later that `torch.compile` would see change, but the plan."""
    write = object.__setattr__
    write(made, "children", children)
    write(made, "context", context)
    write(made, "_plan", None)
    write(made, "_structure", None)


def unflattened(cls: Any, children: Iterable[Any], context: Any) -> Any:
    """A composite of what a pytree function left in its children's place, which may be anything.

    It is not planned: `torch.func.vmap` makes one that nobody steps, and a step finds its structure by itself.
    """
    made: Composite = object.__new__(cls)
    children = tuple(children)
    fill(made, children, context)
    object.__setattr__(made, "links", made._linked() if all([isinstance(c, Transform) for c in children]) else ())
    return made


def links_of(child: Transform) -> tuple[Link, ...]:
    """The links of a part of a composite. A transform that is its own only link is that link: its plan does not hold these."""
    return (Link(child),) if isinstance(child, Single) else child.links


class Composite(Transform):
    """A transform made of others, given by its children and by what is not a transform."""

    __slots__ = ("__weakref__", "_plan", "_structure", "children", "context", "links")
    children: tuple[Transform, ...]
    context: tuple[Any, ...]
    freezes: Any = None
    """The mask of parameters that nothing else in the same chain acts on."""

    def __init__(self, children: Iterable[Transform], context: tuple[Any, ...] = ()) -> None:
        fill(self, tuple(children), context)
        object.__setattr__(self, "links", self._linked())
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_structure", structure_of(self.links))

    def _places(self) -> list[str]:
        return [place for child in self.children for place in child._places()]

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


def check_transform(transform: Any, name: str) -> None:
    """Refuse what is no transform."""
    if not isinstance(transform, Transform):
        raise TypeError(f"{name} takes a transform, but got {transform!r}.{uncalled(transform)}")


def uncalled(x: Any) -> str:
    """A hint at the end of an error, where a factory of transforms was given in place of a transform."""
    factory = inspect.isfunction(x) and (hasattr(x, "declaration") or x.__module__.startswith("purestep."))
    return f" Did you mean to call it: {x.__name__}(...)?" if factory else ""


class Relinked(Composite):
    """A transform around one other, whose links are made of the other's, each by itself; the state is the other's."""

    __slots__ = ()

    def _made(self, value: Primitive) -> Primitive:
        """What one link is here."""
        raise NotImplementedError

    @staticmethod
    def _plain(value: Primitive) -> Primitive:
        """What it was."""
        raise NotImplementedError

    def _linked(self) -> tuple[Link, ...]:
        return tuple([link._replace(transform=self._made(link.transform)) for link in self.children[0].links])

    def _split(self, state: Any) -> list[Any]:
        return self.children[0]._split(state)

    def _join(self, states: Sequence[Any]) -> Any:
        return self.children[0]._join(states)

    def _rebuild(self, primitives: Any) -> Self:
        return type(self)((self.children[0]._rebuild(map(self._plain, primitives)),), self.context)


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
        kind: Any = self.children[0].links[0].transform.declaration.state
        return kind(*states[0][:-1], self.children[1]._join(states[1:]))

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
                f"{type(state).__name__}{f' of {len(state)}' if type(state) is tuple else ''}. A state belongs to the "
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
            raise TypeError(f"chain takes transforms, but argument {i} is {t!r}.{uncalled(t)}")
        children += t.children if type(t) is Chain else [t]
    return Chain(children)


class NamedChain(Chain):
    """Transforms one after the other, each with a name; made with `named_chain`."""

    __slots__ = ()

    def _places(self) -> list[str]:
        return within(self.context[0], self.children)

    def _split(self, state: Any) -> list[Any]:
        (names,) = self.context
        if not isinstance(state, dict) or tuple(state) != names:
            found = f"one with {', '.join(map(repr, state))}" if isinstance(state, dict) else type(state).__name__
            raise TypeError(
                f"The state of a named chain must be a dict with the keys {', '.join(map(repr, names))}, in this order, but "
                f"got {found}. A state belongs to the transform whose init_state made it."
            )
        return super()._split(tuple(state.values()))

    def _join(self, states: Sequence[Any]) -> Any:
        return dict(zip(self.context[0], super()._join(states)))

    def __repr__(self) -> str:
        return f"named_chain({', '.join([f'({name!r}, {child!r})' for name, child in zip(self.context[0], self.children)])})"


def within(names: Sequence[Any], children: Sequence[Transform]) -> list[str]:
    """The places of the links of these transforms, each below its transform's name."""
    return [f"{name}.{place}" if place else str(name) for name, child in zip(names, children) for place in child._places()]


def named_chain(*transforms: tuple[str, Transform]) -> NamedChain:
    """A `chain` whose transforms have names, by which its state and its hyperparameters are found.

    Its state is a dict from names to states, so a checkpoint shows what belongs to what, and code that reads it goes on when
    another transform is put before. `state_dict` names tensors by them: ``"adam.exp_avg.layer1.weight"``.

    >>> import torch, purestep as ps
    >>> opt = ps.named_chain(("clip", ps.clip_by_global_norm(1.0)), ("adam", ps.scale_by_adam()), ("rate", ps.scale(-0.1)))
    >>> state = opt.init_state({"weight": torch.zeros(2)})
    >>> state["adam"].exp_avg
    {'weight': tensor([0., 0.])}
    >>> ps.named_chain(("a", ps.scale(2.0)), ("b", ps.scale(3.0))).replace(**{"b.factor": 4.0}).hyperparams
    {'a.factor': 2.0, 'b.factor': 4.0}

    Args:
        *transforms: pairs of a name and a transform, in the order in which they are applied.

    Returns:
        a transform that computes what `chain` computes of the same transforms.

    Raises:
        TypeError: an argument is not such a pair.
        ValueError: a name is empty, or there twice.
    """
    for i, pair in enumerate(transforms):
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], Transform):
            raise TypeError(f"named_chain takes pairs (name, transform), but argument {i} is {pair!r}.")
    names = tuple([name for name, _ in transforms])
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"The names of a named chain must be different, and not empty, but are {', '.join(map(repr, names))}.")
    return NamedChain([t for _, t in transforms], (names,))
