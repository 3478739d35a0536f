"""What is known of a chain before any tensor is there.

A *plan* cuts a chain into *stages*: runs of leafwise links, and whole links with the links that they wrap. Those links of a
run that act on the same parameters are a *fused chain*, which one program or one of torch's kernels computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.masks import Label
from purestep._core.primitives import Link, Primitive, fields_of, is_off, scheduled, state_type
from purestep._core.torch_api import tree_leaves
from purestep._engine.guards import GuardCache
from purestep._executors.chains import FusedChain, detail, details
from purestep._trace.program import program

LOOKS = 8
"""So many models with different numbers of tensors are kept in mind."""


class ParamSlice(NamedTuple):
    """Some of the parameters, and the plan with the hyperparameters that hold for them."""

    plan: Plan
    rows: range


class Plan:
    """What can be said about a chain of links before any tensor is seen; a transform makes its own once."""

    def __init__(self, links: tuple[Link, ...]) -> None:
        self.links = links
        self.whole = any([link.transform.declaration.whole for link in links])
        self.extras = frozenset([name for link in links for name in link.transform.declaration.extras])
        self.trees = frozenset([name for link in links for name in link.transform.declaration.trees])
        self.off = [is_off(link.transform) for link in links]
        self.fields = [fields_of(link.transform) for link in links]
        self.types: list[Any] = [state_type(link.transform) for link in links]
        self.hypers = [x for link in links for x in tree_leaves(link.transform) if isinstance(x, Tensor)]
        self.foreign = [v for v in [link.transform for link in links] if not v.declaration.whole and not ours(v)]
        self.chains: dict[tuple[bool, tuple[int, ...]], FusedChain] = {}
        self.stages: list[Stage] = []
        for start, stop, whole in runs(links):
            self.stages.append(Stage(self, start, stop, whole))
        if not self.stages or self.stages[-1].whole:
            self.stages.append(Stage(self, len(links), len(links), False))  # where the updates are applied
        self._keys: list[tuple[str, ...]] | None = None
        self.repeated: Any = ...  # what `purestep._engine.step_cache` makes of it, at the first use
        self.guards: dict[tuple[int, int], GuardCache] = {}  # of all tensors of a call, by the number of parameters and of all
        self.final = len(self.stages) - 2 if self.stages[-1].start == len(links) > 0 else -1  # the last stage, if it is whole

    # These are asked by optimizers alone, so they are found out at the first use (not by functools.cached_property, whose lock
    # torch.compile cannot trace).

    @property
    def keys(self) -> list[tuple[str, ...]]:
        """Per link, what an optimizer's state calls its fields."""
        if self._keys is None:
            self._keys = qualified([info.names for info in self.fields], self.links)
        return self._keys

    @property
    def stateless(self) -> bool:
        """Whether no link keeps anything."""
        return all([off or not info.names for off, info in zip(self.off, self.fields)])

    @property
    def optional(self) -> list[bool]:
        """Per link, whether some parameters may lack its state, or a part of it."""
        return [off or bool(link.masks) or info.optional for off, link, info in zip(self.off, self.links, self.fields)]

    def alike(self, states: Sequence[Any]) -> list[Any]:
        """The lists in the states of these links whose tensors are of the parameters' shapes."""
        found: list[Any] = []
        for link, s, info in zip(self.links, states, self.fields):
            like = info.leaves if link.transform.declaration.whole else info.like
            found += [c for c, yes in zip(s, like) if yes]
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that a call takes from here: hyperparameters, and what leaf functions close over."""
        if not self.foreign or torch.compiler.is_compiling():
            return self.hypers
        return [*self.hypers, *[x for value in self.foreign for x in captured(value)]]

    def guards_for(self, count: int, total: int) -> GuardCache:
        """What the tensors of a call with `count` parameters, `total` of all, have looked like."""
        found = self.guards.get((count, total))
        if found is None:
            if len(self.guards) >= LOOKS:
                self.guards.clear()
            found = self.guards[count, total] = GuardCache()
        return found

    def fused_chain(self, positions: tuple[int, ...], scaled: bool = False) -> FusedChain:
        """The links at these positions, run one after the other, perhaps on gradients times a number."""
        found = self.chains.get((scaled, positions))
        if found is None:
            made = FusedChain(positions, [self.links[i].transform for i in positions], scaled)
            found = self.chains[scaled, positions] = made
        return found


def ours(value: Primitive) -> bool:
    """Whether a leaf function is one of the library, which closes over no tensors."""
    return str(getattr(value.declaration.function, "__module__", "")).startswith("purestep.")


def captured(value: Primitive) -> tuple[Tensor, ...]:
    """The tensors that a leaf function closes over."""
    d = value.declaration
    try:
        recipe = (detail(value, (False,) * len(d.fields.names)),)
        return program(recipe, False, False, False, d, form="single").captured
    except Exception:  # to run it will say what is wrong with it
        return ()


class Stage:
    """A run of consecutive leafwise links, or one whole link with the links it is put around."""

    def __init__(self, plan: Plan, start: int, stop: int, whole: bool) -> None:
        self.start, self.stop, self.whole = start, stop, whole
        nested = whole and bool(plan.links[start].transform.declaration.inner)
        self.inner = Plan(plan.links[start + 1 : stop]) if nested else None
        on = [i for i in range(start, stop) if not plan.off[i]]
        self.masked = any([plan.links[i].masks for i in on])
        self.positions = tuple(on)
        self.scheduled = [i for i in on if not whole and scheduled(plan.links[i].transform)]
        self.columns = [(i, f) for i in on for f, scalar in enumerate(plan.fields[i].scalars) if not scalar]
        self.scalars = [(i, f) for i in on for f, scalar in enumerate(plan.fields[i].scalars) if scalar]


def runs(links: Sequence[Link]) -> list[tuple[int, int, bool]]:
    """Runs of consecutive leafwise links, and each whole link with what it is put around: (start, stop, is whole)."""
    result: list[tuple[int, int, bool]] = []
    i = 0
    while i < len(links):
        whole, stop = links[i].transform.declaration.whole, i + 1 + links[i].span
        if not whole and result and not result[-1][2]:
            result[-1] = (result[-1][0], stop, False)
        else:
            result.append((i, stop, whole))
        i = stop
    return result


def qualified(names: list[tuple[str, ...]], links: Sequence[Link]) -> list[tuple[str, ...]]:
    """Per link, the names of its fields in one namespace: qualified by the link's number where two links share a name.

    All leafwise links of a chain count the same updates, so there is one `step`; those inside another transform count its, so
    where there is a `step` outside, theirs is qualified by that transform's number. Links that no parameter has in common share
    names, except whole ones, which may have fields of their own. A whole link may count something else than another one (the
    updates of what it wraps, or those in which it has parameters), so each has a `step` of its own.
    """
    around = surrounding(links)
    is_whole = [link.transform.declaration.whole for link in links]
    taken: set[str] = set()

    def alone(i: int, name: str) -> bool:
        return not any([j != i and name in own and meet(links[i], links[j]) for j, own in enumerate(names)])

    def step(i: int) -> str:
        others = [j for j, own in enumerate(names) if "step" in own and is_whole[j] == is_whole[i]]
        outside = any([around[j] < around[i] and meet(links[i], links[j]) for j in others])
        name = f"{around[i]}.step" if outside else "step"
        if is_whole[i]:
            name = f"{i}.step" if name in taken else name
            taken.add(name)
        return name

    return [tuple([step(i) if n == "step" else n if alone(i, n) else f"{i}.{n}" for n in own]) for i, own in enumerate(names)]


def surrounding(links: Sequence[Link]) -> list[int]:
    """For each link, the one that is put around it, the innermost if there are several; -1 for none."""
    found = [-1] * len(links)
    for i, link in enumerate(links):
        found[i + 1 : i + 1 + link.span] = [i] * link.span
    return found


def meet(a: Link, b: Link) -> bool:
    """Whether two links may act on the same parameter."""
    if a.transform.declaration.whole and b.transform.declaration.whole:
        return True
    labels = {id(m.labels): m.label for m in a.masks if isinstance(m, Label)}
    return all([labels.get(id(m.labels), m.label) == m.label for m in b.masks if isinstance(m, Label)])


def packed_links(plan: Plan) -> set[int]:
    """The links whose states the packed executor would keep in one piece of memory: elementwise, without a kernel."""
    found: set[int] = set()
    for stage in plan.stages:
        if stage.inner is not None:
            found |= {stage.start + 1 + i for i in packed_links(stage.inner)}
        elif stage.positions and plan.fused_chain(stage.positions).kernel is None:
            fused_chain = plan.fused_chain(stage.positions)
            recipe = details(fused_chain, tuple([(False,) * len(info.names) for _, _, info in fused_chain.items]))
            try:
                elementwise = program(recipe, False, False, False, *fused_chain.declarations, form="single").elementwise
            except TypeError:  # a leaf function that cannot be traced runs by itself
                continue
            if elementwise and not fused_chain.encoded:
                # torch adds a sparse tensor to one with a storage offset in the wrong place, beyond the end of its memory
                found |= {i for i in stage.positions if plan.links[i].transform.declaration.sparse != "rows"}
    return found
