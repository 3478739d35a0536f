"""What is known of a chain before any tensor is there.

A *structure* cuts a chain into *stages*: runs of leafwise links, and whole links with the links that they wrap. Those links
of a run that act on the same parameters are a *fused chain*, which one program or one of torch's kernels computes. A structure
knows no numbers, so one serves all transforms that differ in numbers alone: a transform that `torch.func.vmap` makes at every
call finds the structure of the last one. A *plan* is a structure with the links that have the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.cache import DeclarationCache
from purestep._core.masks import Label
from purestep._core.primitives import (
    Fields,
    Kinds,
    Link,
    Primitive,
    fields_of,
    is_off,
    kinds_of,
    scheduled,
    state_type,
    users,
)
from purestep._core.torch_api import tree_leaves
from purestep._engine.guards import GuardCache
from purestep._executors.chains import ChainStructure, FusedChain, detail, details
from purestep._trace.program import program

LOOKS = 8
"""So many models with different numbers of tensors are kept in mind."""


CHAINS = 64
"""So many sets of links of one chain are kept in mind: masks may select others at every call."""


class ParamSlice(NamedTuple):
    """Some of the parameters, and the plan with the hyperparameters that hold for them."""

    plan: Plan
    rows: range


class Stage(NamedTuple):
    """A run of consecutive leafwise links, or one whole link with the links that it wraps."""

    start: int
    stop: int
    whole: bool
    positions: tuple[int, ...]  # the links that do something
    masked: bool  # whether any of these acts on some parameters only
    scheduled: tuple[int, ...]  # the leafwise ones with a schedule among their hyperparameters
    columns: tuple[tuple[int, int], ...]  # link and field of what is more than a number per parameter
    scalars: tuple[tuple[int, int], ...]  # and of what is a number per parameter
    chain: ChainStructure | None  # of a run: all of `positions`
    inner: Structure | None  # of the links that a whole one wraps


class Structure:
    """All that can be said about a chain of links without a number and without a tensor."""

    def __init__(self, links: tuple[Link, ...]) -> None:
        declarations = [link.transform.declaration for link in links]
        self.whole = any([d.whole for d in declarations])
        self.extras = frozenset([name for d in declarations for name in d.extras])
        self.trees = frozenset([name for d in declarations for name in d.trees])
        self.off: tuple[bool, ...] = tuple([is_off(link.transform) for link in links])
        self.fields: tuple[Fields, ...] = tuple([fields_of(link.transform) for link in links])
        self.scheduled = any([scheduled(link.transform) for link in links])
        self.numeric = all([numeric(kinds_of(link.transform)) for link in links])
        self.foreign = tuple([i for i, d in enumerate(declarations) if not d.whole and not d.arrays and not d.ours])
        stages = [self.stage(links, *run) for run in runs(links)]
        if not stages or stages[-1].whole:  # there the updates are applied
            stages.append(self.stage(links, len(links), len(links), False))
        self.stages = tuple(stages)
        self.nests = any([stage.inner is not None for stage in stages])
        self.drops = any([d.drops for d in declarations])
        late = range(len(links)) if self.nests else range(stages[0].stop, len(links))
        self.late = tuple([i for i in self.foreign if i in late])  # leaf functions that run after something may be overwritten
        self.masked = any([bool(link.masks) for link in links])
        self.final = len(stages) - 2 if stages[-1].start == len(links) > 0 else -1  # the last stage, if it is whole
        self.chains: dict[tuple[bool, tuple[int, ...]], ChainStructure] = {}

    def stage(self, links: tuple[Link, ...], start: int, stop: int, whole: bool) -> Stage:
        """The stage of these links."""
        nests = whole and bool(links[start].transform.declaration.inner)
        on = tuple([i for i in range(start, stop) if not self.off[i]])
        return Stage(
            start,
            stop,
            whole,
            on,
            masked=any([links[i].masks for i in on]),
            scheduled=tuple([i for i in on if not whole and scheduled(links[i].transform)]),
            columns=tuple([(i, f) for i in on for f in self.fields[i].columns]),
            scalars=tuple([(i, f) for i in on for f, scalar in enumerate(self.fields[i].scalars) if scalar]),
            chain=None if whole else ChainStructure(on, [links[i].transform for i in on]),
            inner=structure_of(links[start + 1 : stop]) if nests else None,
        )

    def chain(self, positions: tuple[int, ...], values: list[Primitive], scaled: bool) -> ChainStructure:
        """The structure of the links at these positions, whose transforms are given."""
        for stage in () if scaled else self.stages:
            if stage.chain is not None and stage.positions == positions:
                return stage.chain
        if torch.compiler.is_compiling():
            return ChainStructure(positions, values, scaled)  # reading a cache would make its state a guard
        found = self.chains.get((scaled, positions))
        if found is None:
            if len(self.chains) >= CHAINS:
                self.chains.clear()
            found = self.chains[scaled, positions] = ChainStructure(positions, values, scaled)
        return found


_structures: DeclarationCache[Structure] = DeclarationCache(1024)


def structure_of(links: tuple[Link, ...]) -> Structure:
    """The structure of a chain of links; it is made at the first call, and looked up at every other.

    Links have one structure if they have the same declarations, the same hyperparameters are off, None, numbers, tensors or
    schedules, and the same ones are masked and wrap the same number of others. Switches are no part of it. A structure keeps
    neither the declarations nor the types of states, which may lead to them.
    """
    if torch.compiler.is_compiling():
        return Structure(links)  # traced away; reading the cache would make its state a guard
    specs: list[Any] = []
    for link in links:
        value = link.transform
        d = value.declaration
        off = d.off is not None and d.off not in d.intervals and is_off(value)  # by a switch
        specs.append((d.key, off, kinds_of(value), bool(link.masks), link.span))
    key = tuple(specs)
    found = _structures.entries.get(key)
    if found is None:
        found = Structure(links)
        _structures.keep(key, found, [link.transform.declaration for link in links])
    return found


def numeric(kinds: Kinds) -> bool:
    """Whether all hyperparameters are plain numbers or None."""
    return all([numeric(kind) if isinstance(kind, tuple) else kind in ("number", "zero", None) for kind in kinds])


class Plan:
    """A structure, and the links that have its numbers; a transform makes its own once."""

    def __init__(self, links: tuple[Link, ...], structure: Structure) -> None:
        self.links, self.structure = links, structure
        self.whole, self.extras, self.trees = structure.whole, structure.extras, structure.trees
        self.off, self.fields = structure.off, structure.fields
        self.types: list[Any] = [state_type(link.transform) for link in links]  # a type may lead to its declaration
        self.stages, self.final = structure.stages, structure.final
        self.inner: list[Plan | None] = [None] * len(self.stages)  # per stage, what its whole link wraps
        if structure.nests:
            self.inner = [None if s.inner is None else Plan(links[s.start + 1 : s.stop], s.inner) for s in self.stages]
        self.hypers: list[Tensor] = [] if structure.numeric else tensors_of(links)
        self.chains: dict[tuple[bool, tuple[int, ...]], FusedChain] = {}
        self._keys: list[tuple[str, ...]] | None = None
        self.last_call = -1  # the last stage that calls functions of a user's on tensors
        if len(self.stages) > 1:
            calls = [n for n, stage in enumerate(self.stages) if any(map(calls_back, links[stage.start : stage.stop]))]
            self.last_call = max(calls, default=-1)
        self.scheduled: tuple[int, ...] = ()  # the links that follow schedules of a user's
        if structure.scheduled:
            self.scheduled = tuple([i for i, link in enumerate(links) if follows_users(link.transform)])
        self.rehearses = bool(self.scheduled or structure.late)  # see `purestep._engine.rehearsal`
        self.rehearsed = False  # the leaf functions
        self.repeated: Any = ...  # what `purestep._engine.step_cache` makes of it, at the first use
        self.guards: dict[tuple[int, int], GuardCache] = {}  # of all tensors of a call, by the number of parameters and of all

    def reads(self, selected: Callable[[tuple[Any, ...]], list[bool]], count: int) -> list[bool]:
        """Whether the gradient of each of `count` parameters can reach a parameter or a state.

        It cannot where `set_to_zero` (or `freeze`) is the first that acts on the parameter, or comes after leafwise transforms
        that keep nothing. What no transform acts on passes through, and so reaches the parameter.

        Args:
            selected: which parameters are under some masks.
            count: how many parameters there are.
        """
        read: list[bool | None] = [None] * count  # None as long as no link has decided
        for stage, inner in zip(self.stages, self.inner):
            for i in range(stage.start, stage.start + 1 if stage.whole else stage.stop):
                value, d = self.links[i].transform, self.links[i].transform.declaration
                if self.off[i] or not (d.whole or d.drops or set(self.fields[i].names) - {"step"}):
                    continue
                acts = selected(self.links[i].masks) if self.links[i].masks else [True] * count
                decided = [not d.drops] * count
                if inner is not None and d.forwards is not None and d.forwards(value.arguments):
                    decided = inner.reads(selected, count)
                read = [x if r is None and yes else r for r, yes, x in zip(read, acts, decided)]
        return [r is not False for r in read]

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
        foreign = self.structure.foreign
        if not foreign or torch.compiler.is_compiling():
            return self.hypers
        return [*self.hypers, *[x for i in foreign for x in captured(self.links[i].transform)]]

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
            values = [self.links[i].transform for i in positions]
            found = FusedChain(self.structure.chain(positions, values, scaled), values)
            if len(self.chains) >= CHAINS and not torch.compiler.is_compiling():
                self.chains.clear()
            self.chains[scaled, positions] = found
        return found


def tensors_of(links: tuple[Link, ...]) -> list[Tensor]:
    """The tensors among the hyperparameters, and among those of schedules."""
    found: list[Tensor] = []
    for link in links:
        for x in map(link.transform.arguments.__getitem__, link.transform.declaration.hypers):
            if isinstance(x, Tensor):
                found.append(x)
            elif not (x is None or type(x) is float or (type(x) is tuple and {*map(type, x)} == {float})):
                found += [y for y in tree_leaves(x) if isinstance(y, Tensor)]
    return found


def calls_back(link: Link) -> bool:
    """Whether a link calls a function of a user's at every step, on tensors: its own, a closure, or one among its arguments."""
    value, d = link.transform, link.transform.declaration
    if not d.whole:
        return bool(d.arrays) and not d.ours
    return not d.ours or bool(d.extras) or any([users(x) for n, x in value.arguments.items() if n not in d.intervals])


def follows_users(value: Primitive) -> bool:
    """Whether a hyperparameter follows a schedule that calls a function of a user's."""
    return any([users(value.arguments[name]) for name in value.declaration.hypers])


def captured(value: Primitive) -> tuple[Tensor, ...]:
    """The tensors that a leaf function closes over."""
    d = value.declaration
    try:
        recipe = (detail(value, (False,) * len(d.fields.names)),)
        return program(recipe, False, False, False, d, form="single").captured
    except Exception:  # to run it will say what is wrong with it
        return ()


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
    for stage, inner in zip(plan.stages, plan.inner):
        if inner is not None:
            found |= {stage.start + 1 + i for i in packed_links(inner)}
        elif stage.positions and plan.fused_chain(stage.positions).kernel is None:
            fused_chain = plan.fused_chain(stage.positions)
            if fused_chain.arrays:
                continue
            recipe = details(fused_chain, fused_chain.structure.present)
            try:
                elementwise = program(recipe, False, False, False, *fused_chain.declarations, form="single").elementwise
            except TypeError:  # a leaf function that cannot be traced runs by itself
                continue
            if elementwise and not fused_chain.encoded:
                # torch adds a sparse tensor to one with a storage offset in the wrong place, beyond the end of its memory
                found |= {i for i in stage.positions if plan.links[i].transform.declaration.sparse != "rows"}
    return found
