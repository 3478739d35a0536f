"""Parameters before their first step.

Their state exists from construction, so that it can be saved and loaded, and hooks and subclasses find none during the first
step, as in torch. At that step, what depends on values that have changed since construction is made anew; see `begun`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core.plain import plain
from purestep._core.primitives import Link, Primitive, fields_of, fresh_state, fresh_whole_state, is_off
from purestep._core.values import same
from purestep._engine.counters import traced
from purestep._optimizer.begun import Begun, Dependence, kind, options_in, renewed
from purestep._optimizer.fill import fill, members
from purestep._optimizer.options import Options
from purestep._optimizer.selection import Contents
from purestep.transform import Transform


class Start(NamedTuple):
    """A parameter at its first step."""

    p: Tensor
    begun: Begun
    state: dict[str, Any]
    own: dict[str, Tensor]  # the fields that the optimizer made
    given: set[str]  # the names of the fields that the user made


class FirstSteps:
    """The parameters that have made no step, and how their state began.

    `uncounted` are fields that torch keeps without counting updates: where one was given, the next update is not the first.
    """

    def __init__(self, uncounted: frozenset[str], saved: Mapping[str, Any]) -> None:
        self.uncounted = uncounted
        self.untouched: dict[Tensor, Begun] = {p: x.again() for p, x in saved.get("_untouched", {}).items()}
        self.aside: dict[Tensor, tuple[dict[str, Tensor], set[str]]] = {}  # see `set_aside`
        began = saved.get("_begun_shared", {})  # what is shared as it began: its tensors and their versions
        self._shared: dict[str, tuple[Tensor, int]] = {n: (x, x._version) for n, (x, _) in began.items()}
        self._dependence = Dependence()

    def saved(self, contents: Contents) -> dict[str, Any]:
        """What a pickle has, to be given to `__init__`."""
        untouched = {p: x._replace(fields=x.made(contents.of(p))) for p, x in self.untouched.items()}
        return {"_begun_shared": self._shared, "_untouched": untouched}

    # -- outside a step

    def begin(self, contents: Contents, params: list[Tensor], transform: Transform) -> None:
        """Make the state of parameters before their first step; frozen ones have none until they get a gradient."""
        begun = [p for p in params if p.requires_grad and not is_lazy(p)]
        with torch.no_grad():
            fill(contents, begun, transform)
            for link in transform.links if begun and not traced() else ():
                if not link.transform.declaration.whole:
                    self._dependence.leafwise(link.transform, min(begun, key=Tensor.numel))
        self.remember(contents, begun, transform)

    def remember(self, contents: Contents, params: list[Tensor], transform: Transform) -> None:
        """Keep in mind how the state of these parameters began."""
        options = options_in(transform)
        self.untouched.update((p, Begun.of(p, contents.place.without(contents.of(p)), options)) for p in params)
        self._shared.update((n, (x, x._version)) for n, x in contents.shared.items() if isinstance(x, Tensor))

    def forget(self, contents: Contents, options: Options) -> None:
        """Drop the state that was made for parameters which have left their groups before their first step."""
        there = set(contents.params)
        gone = [p for p in self.untouched if p not in there]
        if not gone:
            return
        new = {p for p in there if p not in contents.state}  # before one of them gets what is shared
        contents.place.move(contents.state, contents.groups)
        for p in gone:
            del self.untouched[p]
            contents.state.pop(p, None)
        for group in contents.groups:
            params = [p for p in group["params"] if p in new]
            if params:
                self.begin(contents, params, options.transform(group, contents.groups))

    def renew(self, contents: Contents, transforms: list[Transform]) -> None:
        """Make the state of parameters without a step anew where options have changed: what is saved goes with them."""
        for group, transform in zip(contents.groups, transforms):
            options = options_in(transform)
            stale = [p for p in group["params"] if p in self.untouched and not same(self.untouched[p].options, options)]
            owns = [self.untouched[p].own(contents.of(p)) for p in stale]
            given = [contents.of(p).keys() - own.keys() for p, own in zip(stale, owns)]
            for p, own in zip(stale, owns):
                for name in own:
                    del contents.state[p][name]
            with torch.no_grad():
                fill(contents, stale, transform)
            for p, own, names in zip(stale, owns, given):
                made = {n: renewed(own.get(n), x) for n, x in contents.of(p).items() if n not in names}
                contents.state[p].update(made)
                self.untouched[p] = Begun.of(p, made, options)

    # -- loading

    def began(self, contents: Contents) -> dict[Tensor, tuple[dict[str, Any], dict[str, Tensor]]]:
        """How the state of each parameter began: the options that it depends on, and the fields that the optimizer made."""
        return {p: (begun.options, begun.own(contents.of(p))) for p, begun in self.untouched.items()}

    def resume(
        self, contents: Contents, loaded: list[tuple[Tensor, dict[str, Any]]], transform: Transform, began: dict[Tensor, Any]
    ) -> None:
        """Remember the parameters of a group that have made no step in the state that was loaded for them.

        `began` is how the state began that was there before.
        """
        if any([link.span for link in transform.links]):
            return  # within another transform, what has made no step may have seen gradients
        for p, state in loaded:
            options, own = began.get(p, ({}, {}))
            hooked = bool(options) and same(own, state)  # a hook has put it among what is loaded
            if is_zero(contents.of(p).get("step")) and (hooked or self._as_it_began(contents, p, transform)):
                self.remember(contents, [p], transform)
                if hooked:
                    self.untouched[p] = self.untouched[p]._replace(options=options)

    def _as_it_began(self, contents: Contents, p: Tensor, transform: Transform) -> bool:
        """Whether the state of a parameter is what `init` makes, so that nothing is lost if it is made anew.

        What `init` makes of the parameter's values cannot be compared: these may have changed since. Nor are tensors that are
        not plain, which processes would have to talk about.
        """
        state = contents.of(p)
        if p.is_meta or not plain([p], *[[x] for x in state.values() if isinstance(x, Tensor)]):
            return True
        for link, names in zip(transform.links, transform.plan.keys):
            value = link.transform
            skipped = value.declaration.whole or is_off(value) or not contents.selected(link.masks, [p])[0]
            if skipped or not names or self._dependence.leafwise(value, p):
                continue
            for name, x in zip(names, fresh_state(value, p)):
                old = state.get(name)
                if isinstance(old, Tensor) and isinstance(x, Tensor) and not same(old, x.to(old.dtype)):
                    return False
        return True

    # -- around a step

    def set_aside(self, contents: Contents, options: Options, everything: bool) -> None:
        """Take the state with which nothing was computed from parameters that are about to step.

        Hooks and subclasses that make a state where there is none find none, as in torch. What they do not make is put back.
        """
        self.forget(contents, options)
        for p, begun in self.untouched.items():
            state = contents.state.get(p)
            if state is None or not (everything or p.grad is not None):
                continue
            own = begun.own(state)
            self.aside[p] = own, state.keys() - own.keys()
            for name in own:
                del state[name]

    def put_back(self, contents: Contents) -> None:
        """Undo `set_aside` for parameters that made no step after all."""
        for p, (own, others) in self.aside.items():
            begun, state = self.untouched.get(p), contents.state[p]
            if begun is None:
                continue
            if {n for n, x in state.items() if own.get(n) is not x} == others:
                ordered = {n: own.get(n, state.get(n)) for n in begun.fields if n in own or n in state}
                rest = {n: x for n, x in state.items() if n not in ordered}
                state.clear()
                state.update(ordered)
                state.update(rest)
            else:
                del self.untouched[p]  # a step that is not ours has made a state of its own
        self.aside.clear()

    # -- in a step

    def touch(self, contents: Contents, params: list[Tensor], transform: Transform) -> None:
        """Before the first step of some of these parameters: make anew what depends on values that may have changed."""
        first = [p for p in dict.fromkeys(params) if p in self.untouched]
        if not first:
            return
        beginning = all([p in self.untouched for p in contents.params if p.requires_grad])
        starts, options = [self._start(contents, p) for p in first], options_in(transform)
        try:
            for start in starts:
                for name, x in start.own.items():
                    if start.state.get(name) is x:
                        del start.state[name]
            for link, names in zip(transform.links, transform.plan.keys):
                if is_off(link.transform) or not names:
                    continue
                on = [x for x, yes in zip(starts, contents.selected(link.masks, first)) if yes]
                if not link.transform.declaration.whole:
                    self._touch_leafwise(link.transform, names, on, options.get(names[0]))
                elif on:
                    self._touch_whole(contents, link, names, on, transform, beginning)
        except BaseException:
            for start in starts:
                for name, x in start.own.items():
                    start.state.setdefault(name, x)
            raise
        for p in first:
            del self.untouched[p]
            self.aside.pop(p, None)

    def _start(self, contents: Contents, p: Tensor) -> Start:
        """What the optimizer made of the state of a parameter, and what is the user's."""
        begun = self.untouched[p]
        state = contents.state[p] if begun.fields or p in contents.state else {}
        own = self.aside[p][0] if p in self.aside else begun.own(state)
        return Start(p, begun, state, own, {n for n, x in state.items() if own.get(n) is not x})

    def _touch_leafwise(self, value: Primitive, names: tuple[str, ...], starts: list[Start], options: Any) -> None:
        """The fields of a leafwise transform, with the `options` that they depend on."""
        for p, begun, state, own, given in starts:
            again = begun.kind != kind(p) or self._dependence.leafwise(value, p)
            again |= not same(begun.options.get(names[0]), options)
            again |= torch.is_grad_enabled() and bool(options)  # options that a derivative is taken of
            fields = dict(zip(names, fresh_state(value, p))) if again else own
            for name in names:
                if name not in given and fields.get(name) is not None:
                    state[name] = renewed(own.get(name), fields[name]) if again else own[name]
            if self.uncounted & given & set(names) and "step" in own and "step" not in given:
                state["step"] = own["step"].fill_(1)

    def _touch_whole(
        self, contents: Contents, link: Link, names: tuple[str, ...], starts: list[Start], transform: Transform, beginning: bool
    ) -> None:
        """The fields of a whole transform: what it keeps per parameter, and its own fields before the very first step."""
        value, params, options = link.transform, [x.p for x in starts], options_in(transform).get(names[0])
        changed = any([x.begun.kind != kind(x.p) or not same(x.begun.options.get(names[0]), options) for x in starts])
        changed |= torch.is_grad_enabled() and bool(options)
        again = set(range(len(names))) if changed else self._dependence.whole(value, min(params, key=Tensor.numel))
        around = list(dict.fromkeys([*members(contents, link, bool(transform.plan.extras)), *params]))
        fresh = fresh_whole_state(value, around) if again else ()
        for f, (name, leaf) in enumerate(zip(names, fields_of(value).leaves)):
            column = dict(zip(around, fresh[f])) if leaf and f in again else {}
            for p, _, state, own, _ in starts:
                if leaf and name in own and name not in state:
                    state[name] = renewed(own[name], column[p]) if f in again else own[name]
            if not leaf and f in again and beginning:
                shared, first = contents.shared, self._shared.get(name)
                if first is not None and shared.get(name) is first[0] and first[0]._version == first[1]:
                    shared[name] = renewed(first[0], fresh[f])


def is_zero(x: Any) -> bool:
    """Whether this is a counter, and 0."""
    return isinstance(x, Tensor) and x.numel() == 1 and x.is_cpu and x.item() == 0
