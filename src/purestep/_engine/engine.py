"""Lists in, lists out: the links of a transform, run on all parameters at once.

This is where a call decides how its leaf functions are run. The mode is chosen once, by `choose`:

* ``leaf``: the program of one tensor, in operations that can be differentiated and batched, one parameter at a time or small
  ones as one vector. Inside `torch.func`, under forward-mode differentiation, or when anything requires grad. The leaf function
  itself runs where ``executor="leaf"`` asks for it, and where dtypes are mixed.
* ``program``: all parameters at once on `torch._foreach_*` (see `purestep._trace.program`), or a kernel of `KERNELS` when
  the end of a chain spells one.
* ``traced``: the same program while `torch.compile`, `make_fx` or `torch.export` looks on; numbers stay tensors.

All but the first is for plain tensors (see `purestep._core.plain`). Others are run by themselves, `Call.apart`: sharded ones
on the parts that this process has where that is right, any other one by one, in the operations of a program of one tensor.

What the functions of a chain bring in by themselves (a schedule, a whole transform, an extra argument) may have a history that
no input has. Where autograd looks on, a call of another mode looks at what comes out of them, and goes on in mode ``leaf`` from
the first of them that requires grad.

Parameters are sorted into *buckets*, which differ in what a program cannot take as an input: dtype, device, whether they are
plain, masks, the number of updates so far. Almost always there is one bucket, and finding that out is all it costs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from purestep._core import maths, sharded
from purestep._core.lists import (
    alike,
    cast,
    clones,
    first_places,
    flattened,
    imaginary,
    overwrite,
    parted,
    pick,
    put,
    real,
    same_layout,
    widest,
)
from purestep._core.plain import plain
from purestep._core.primitives import EmptyState, Fields, Link, Primitive, evaluated, fresh_state, single
from purestep._core.torch_api import (
    BelowAutograd,
    DisableFuncTorch,
    dispatch_mode_count,
    foreach_add,
    foreach_add_,
    foreach_copy_,
    foreach_zero_,
    tree_leaves,
)
from purestep._core.values import Schedule
from purestep._engine.plan import FUSED_DTYPES, MERGED_DTYPES, Group, Segment, Stage, absent, details, encodes, joinable
from purestep._executors import compiled
from purestep._executors import vmapped as batches
from purestep._executors.packed import COUNT, SIZE, Scratch, borrow, give_back, small, split
from purestep._executors.tiles import calculate, chunks, pieces, through
from purestep._executors.vmapped import Level
from purestep._trace.program import call, program, runner

Executor: TypeAlias = Literal["leaf", "foreach", "fused", "compiled"]
EXECUTORS: tuple[Executor, ...] = ("leaf", "foreach", "fused", "compiled")
Mode: TypeAlias = Literal["leaf", "program", "traced"]


# -------------------------------------------------------------------------------------------------------------- one call


class Call:
    """One update of all parameters.

    `params` and `grads` are lists; `states` holds, per link, a list of its state's fields, and a field is a list over the
    parameters (or, in a whole transform, also a value of its own). Every parameter has a gradient: the others never get
    here. `mask` says which of these parameters some masks select.
    `alone` says that no one else holds their counters. `private` says that the state belongs to an optimizer: nobody asks
    for the version counters of its tensors. `seen` says that all tensors have been looked at, `plain` that they are known to
    be.
    `copies` says that the parameters are copies of the caller's, so that those which a transform has moved may be new ones.
    `extras` are the arguments that some whole transforms ask for at each update.
    """

    def __init__(
        self,
        grads: list[Any],
        params: list[Any],
        states: list[Any],
        mask: Callable[[tuple[Any, ...]], list[bool]],
        mode: Mode,
        *,
        apply: bool,
        donate: bool,
        alone: bool,
        executor: Executor | None,
        private: bool = False,
        seen: bool = False,
        plain: bool = False,
        copies: bool = False,
        extras: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.grads, self.params, self.states = grads, params, states
        self.mask, self.mode, self.apply, self.donate, self.alone = mask, mode, apply, donate, alone
        self.executor, self.private, self.seen, self.copies, self.extras = executor, private, seen, copies, extras
        self.plain = plain or seen
        self.odd: list[bool] | None = None  # which parameters have tensors that are not plain; None for none
        self.own = False  # whether the gradients may be overwritten: only where they are copies in a buffer of the engine's
        self.factor: Any = None  # what they are still to be multiplied by
        self.write = donate and executor == "leaf" and not maths.recorded(grads + params)  # leaf by leaf, in place
        self.level = Level.now() if mode == "leaf" and executor is None else None  # of vmap, if it can be stepped out of
        self.read: dict[int, Any] = {}  # counters as numbers, by identity
        self.scheduled: dict[Any, tuple[Any, Any]] = {}  # a counter and what a schedule gives there, by identity
        self.made: dict[Any, Tensor] = {}  # numbers as counters
        self.writes: list[tuple[int, int, Sequence[int] | None, Any]] = []  # link, field, rows, new value

    def run(self, groups: Sequence[Group]) -> tuple[list[Any], list[Any]]:
        """The new parameters (or the updates), and the new states."""
        plan = groups[0].plan
        self.fields, self.trees = plan.fields, plan.trees
        self.moved = False  # whether the last transform has applied its updates itself
        last = plan.stages[-1]
        if self.params:
            for n, stage in enumerate(plan.stages):
                if stage.whole:
                    self.scale()
                    self.whole(groups, n)
                elif self.moved:
                    if self.executor == "fused" and plan.stages[-2].inner is None:
                        demand_kernel(plan.segment(()), self.params)
                    new = not self.copies and not all(map(operator.is_, self.grads, self.params))
                    if self.donate and new and not maths.recorded(self.grads + self.params):
                        self.grads = overwrite(self.params, self.grads)
                elif stage.stop > stage.start or self.apply:
                    self.leafwise(groups, n, self.apply and stage is last)
            self.scale()
            if self.writes:
                self.settle()
        return self.grads, self.states

    def looking(self) -> bool:
        """Whether something may still turn up that requires grad."""
        return self.mode != "leaf" and torch.is_grad_enabled()

    def record(self) -> None:
        """From here on everything is recorded by autograd, so nothing is written in place."""
        self.mode, self.donate = "leaf", False

    def scale(self) -> None:
        """Multiply the gradients by the number that they are still to be multiplied by."""
        if self.factor is not None:
            factor = self.factor if isinstance(self.factor, Tensor) else torch.tensor(self.factor, dtype=torch.float64)
            self.grads, self.factor = maths.multiply(self.grads, factor), None

    # -- whole transforms

    def whole(self, groups: Sequence[Group], n: int) -> None:
        """The `n`-th stage, a whole transform, with those it is put around."""
        plan = groups[0].plan
        stage = plan.stages[n]
        i = stage.start
        link, info, fields = plan.links[i], plan.fields[i], self.states[i]
        value = link.transform
        d = value.declaration
        on = self.selected(link)
        rows = None if on is None else [k for k, yes in enumerate(on) if yes]
        if rows == []:
            return  # none of its parameters has a gradient
        count = fields[info.step] if info.step >= 0 else None
        arguments = {n: self.lower(x, count) if n in d.intervals else x for n, x in value.arguments.items()}
        arguments |= {n: self.extra(n, rows) for n in d.extras}
        given: list[Any] = [pick(c, rows) if leaf else c for c, leaf in zip(fields, info.leaves)]
        self.moved = self.apply and n == plan.final and rows is None and (d.moves or d.passes)
        inner = None
        if stage.inner is not None:
            plans: list[Any] = [g.plan.stages[n].inner for g in groups]
            within = [Group(inner_plan, g.rows) for inner_plan, g in zip(plans, groups)]
            arguments[d.inner] = inner = Inner(self, within, rows, self.moved and d.passes)
            given.append(inner.state(self.states[i + 1 : stage.stop]))
        state = EmptyState() if d.state is None else d.state(*given)
        new, after = d.function(pick(self.grads, rows), state, pick(self.params, rows), **arguments)
        if self.looking() and (requires_grad(new) or requires_grad(after)):
            self.record()
        if inner is not None:
            check_nested(d, after, stage.stop - i - 1)
            self.states[i + 1 : stage.stop] = inner.put(self.states[i + 1 : stage.stop], after.inner)
            after = self.reused(state, after, info, new)
        if d.state is not None:
            self.states[i] = [list(x) if leaf else x for x, leaf in zip(after, info.leaves)]
            if rows is not None:
                self.states[i] = [put(c, rows, x) if leaf else x for c, x, leaf in zip(fields, after, info.leaves)]
        elif count is not None:
            self.states[i] = [count + 1]
        if d.scales:
            if rows is None and self.mode == "program":
                self.factor = new.item() if isinstance(new, Tensor) and new.is_cpu else new
                return
            new = maths.multiply(pick(self.grads, rows), torch.as_tensor(new))
        if d.moves and not self.moved:
            new = [x - p for x, p in zip(new, pick(self.params, rows))]
        self.grads = list(new) if rows is None else put(self.grads, rows, new)

    def reused(self, olds: Sequence[Any], news: Sequence[Any], info: Fields, updates: Any = ()) -> list[Any]:
        """New fields in the memory of the old ones, if that was given away, and where neither they nor the updates are in it.

        Counters may be someone else's, too.
        """
        result = list(news[: len(info.names)])
        if not self.donate or self.mode != "program":
            return result
        columns = [old if leaf else [old] for old, leaf in zip(olds, info.leaves)]
        held = {id(x) for column in columns for x in column}
        for f, (old, leaf) in enumerate(zip(columns, info.leaves)):
            new = result[f] if leaf else [result[f]]
            pairs = [(x, y) for x, y in zip(old, new) if isinstance(x, Tensor) and isinstance(y, Tensor)]
            if not pairs or any([id(y) in held for _, y in pairs]) or not (self.alone or (leaf and not info.scalars[f])):
                continue
            if leaf and shared([x for x, _ in pairs], updates):
                continue
            overwrite(*map(list, zip(*pairs)))
            result[f] = [y if x is None else x for x, y in zip(old, new)] if leaf else old[0]
        return result

    def extra(self, name: str, rows: list[int] | None) -> Any:
        """An extra argument, for some of the parameters: a function of all is one of these, the others held fixed."""
        given = self.extras[name]
        if name in self.trees:
            return pick(given, rows)
        if name == "value":
            return sharded.whole(given)
        if rows is None or name != "value_and_grad":
            return given

        def some(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            value, grads = given(put(self.params, rows, params))
            return value, pick(grads, rows)

        return some

    # -- leafwise transforms

    def leafwise(self, groups: Sequence[Group], n: int, apply: bool) -> None:
        """The `n`-th stage, a run of consecutive leafwise links, with `params + updates` at its end if `apply`."""
        stage = groups[0].plan.stages[n]
        if self.executor == "fused" and apply:
            for group in groups:
                demand_kernel(group.plan.segment(group.plan.stages[n].positions), self.params)
        if stage.scheduled and self.looking():
            self.evaluate(groups, n)
        self.odd = None if self.plain else self.unusual(stage)
        if self.mode == "leaf" or (isinstance(self.factor, Tensor) and not alike([p.device for p in self.params])):
            self.scale()
        if self.odd is not None:
            self.scale()
        scaled = self.factor is not None
        uniform = len(groups) == 1 and self.uniform(stage)
        segment = groups[0].plan.segment(stage.positions, scaled) if uniform else None
        if segment is not None and not self.mixed(segment, apply):
            self.grads = self.bucket(segment, None, apply)
        else:
            out = list(self.grads)
            for group in groups:
                for rows, positions in self.buckets(group, group.plan.stages[n], apply):
                    for k, u in zip(rows, self.bucket(group.plan.segment(positions, scaled), rows, apply)):
                        out[k] = u
            self.grads = out
        self.factor = None

    def unusual(self, stage: Stage) -> list[bool] | None:
        """Which parameters have tensors in this stage that are not plain; None if they all are."""
        lists = [self.grads, self.params, *[self.states[i][f] for i, f in stage.columns]]
        if plain(*lists, optional=True):
            return None
        return [not plain(row, optional=True) for row in zip(*lists)]

    def evaluate(self, groups: Sequence[Group], n: int) -> None:
        """Call the schedules of the `n`-th stage: this must be known before anything is written in place."""
        for plan, rows in groups:
            for i in plan.stages[n].scheduled:
                on, value = self.selected(plan.links[i]), plan.links[i].transform
                column = self.states[i][plan.fields[i].step]
                counts = [column[k] for k in rows if on is None or on[k]]
                if not torch.compiler.is_compiling():
                    counts = list({id(x): x for x in counts}.values())
                for count in counts:
                    for name in value.declaration.hypers:
                        self.lower(value.arguments[name], count)

    def uniform(self, stage: Stage) -> bool:
        """Whether all parameters can be taken together."""
        if stage.masked or self.odd is not None:
            return False
        params, states = self.params, self.states
        for i, f in stage.scalars:
            if states[i][f][0] is None or (self.mode != "leaf" and not one(states[i][f], self.mode)):
                return False
        for i, f in stage.columns:
            if not all([x is not None for x in states[i][f]]):
                return False
        return alike([p.dtype for p in params]) and (all([p.is_cpu for p in params]) or alike([p.device for p in params]))

    def mixed(self, segment: Segment, apply: bool) -> bool:
        """Whether there are small tensors that are better packed, and large ones that are not."""
        if self.executor != "compiled" or self.mode != "program" or self.fuses(segment, apply):
            return False
        few = sum([p.numel() <= SIZE for p in self.params])
        return COUNT <= few < len(self.params)

    def fuses(self, segment: Segment, apply: bool) -> bool:
        """Whether a fused kernel is wanted: in the place of what would be compiled, if it is all of it and may write where it
        reads."""
        if not apply or segment.kernel is None or self.executor == "foreach":
            return False
        return self.executor != "compiled" or (self.donate and not segment.first)

    def buckets(self, group: Group, stage: Stage, apply: bool) -> list[tuple[list[int], tuple[int, ...]]]:
        """The rows that one program can take together, and the links that act on them."""
        plan, rows = group.plan, group.rows
        params = [self.params[k] for k in rows]
        masks = [None if m is None else [m[k] for k in rows] for m in [self.selected(plan.links[i]) for i in stage.positions]]
        keys: list[Sequence[Any]] = [[(p.dtype, p.device) for p in params], *[m for m in masks if m is not None]]
        if self.odd is not None:
            keys.append([self.odd[k] and (2 if sharded.is_sharded(self.params[k]) else 1) for k in rows])
        if self.mixed(plan.segment(stage.positions), apply):
            keys.append([p.numel() <= SIZE for p in params])
        for i, f in (*stage.columns, *stage.scalars):
            values = [self.states[i][f][k] for k in rows]
            keys.append([x is None for x in values])
            if (i, f) in stage.scalars and self.mode != "leaf":
                readable = self.mode == "program" and all([x is None or x.is_cpu for x in values])
                keys.append([x if x is None else self.number(x) for x in values] if readable else first_places(values))
        found: dict[tuple[Any, ...], list[int]] = {}
        for k, key in enumerate(zip(*keys)):
            found.setdefault(key, []).append(k)
        return [
            ([rows[k] for k in ks], tuple([i for i, m in zip(stage.positions, masks) if m is None or m[ks[0]]]))
            for ks in found.values()
        ]

    def selected(self, link: Link) -> list[bool] | None:
        """Whether a link acts on each parameter; None if it acts on all."""
        return self.mask(link.masks) if link.masks else None

    # -- one bucket

    def bucket(self, segment: Segment, rows: list[int] | None, apply: bool) -> list[Any]:
        """Run these links on these rows, write their states, and return the updates, or the parameters if `apply`."""
        grads, params = self.grads, self.params
        fields = [self.states[i] for i, _, _ in segment.items]
        if rows is not None:
            grads, params = pick(grads, rows), pick(params, rows)
            fields = [[pick(c, rows) for c in own] for own in fields]
        for (i, value, _), own in zip(segment.items, fields):
            if own and own[0][0] is None and all([c[0] is None for c in own]):
                made = [fresh_state(value, p) for p in params]  # it was off, or the parameter was masked, when init ran
                own[:] = [list(c) for c in zip(*made)]
                for f, column in enumerate(own):
                    self.states[i][f] = column if rows is None else put(self.states[i][f], rows, column)
                if not all([alike([x is None for x in column]) for column in own]):  # large ones have other fields than small
                    return self.parts(segment, range(len(self.params)) if rows is None else rows, own, apply)
        if self.odd is not None and self.odd[0 if rows is None else rows[0]]:
            updates, news = self.apart(segment, grads, params, fields, apply)
        else:
            updates, news = self.together(segment, grads, params, fields, apply)
        for (i, _, info), new in zip(segment.items, news):
            for f, (x, scalar) in enumerate(zip(new, info.scalars)):
                if x is None:
                    continue  # a field that these parameters do not have
                if scalar and self.mode != "leaf":
                    self.writes.append((i, f, rows, x))
                    continue
                self.states[i][f] = x if rows is None else put(self.states[i][f], rows, x)
        return updates

    def together(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Run these links on plain tensors: the updates, or the parameters if `apply`, and the new fields."""
        complex_ = params[0].is_complex()
        if complex_:
            grads, params, fields = self.in_reals(segment, grads, params, fields)
        if self.mode == "program":
            updates, news = self.execute(segment, grads, params, fields, apply)
            if self.donate:  # what was written in place, below autograd's sight
                written = list(params) if apply else []
                if not self.private:
                    columns = [own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.columns]
                    written += [x for column in columns for x in column if x is not None]
                torch.autograd.graph.increment_version(written)
        else:
            run = self.program if self.mode != "leaf" else self.leaf if self.executor == "leaf" else self.single
            updates, news = run(segment, grads, params, fields, apply)
        return (imaginary(updates), self.out_of_reals(segment, news)) if complex_ else (updates, news)

    def in_reals(self, segment: Segment, grads: Any, params: Any, fields: Any) -> tuple[Any, Any, Any]:
        """Complex tensors as pairs of reals, in the same memory."""
        kinds = [info.scalars for _, _, info in segment.items]
        fields = [[c if scalar else real(c) for c, scalar in zip(own, scalars)] for own, scalars in zip(fields, kinds)]
        return real(grads), real(params), fields

    def out_of_reals(self, segment: Segment, news: Any) -> list[list[Any]]:
        """`in_reals` undone, of new fields."""
        kinds = [info.scalars for _, _, info in segment.items]
        return [[x if scalar or x is None else imaginary(x) for x, scalar in zip(new, s)] for new, s in zip(news, kinds)]

    def parts(self, segment: Segment, rows: Sequence[int], columns: list[list[Any]], apply: bool) -> list[Any]:
        """`bucket`, of rows that lack different fields of a state."""
        found: dict[tuple[bool, ...], list[int]] = {}
        for k, fields in enumerate(zip(*columns)):
            found.setdefault(tuple([x is None for x in fields]), []).append(k)
        out: list[Any] = [None] * len(rows)
        for ks in found.values():
            for k, u in zip(ks, self.bucket(segment, [rows[k] for k in ks], apply)):
                out[k] = u
        return out

    # -- what is not plain

    def apart(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Run these links on tensors of which each parameter has some that are not plain. What was given away keeps its
        identity, and is written by operations of its own."""
        if not sharded.is_sharded(params[0]):
            return self.one_by_one(segment, grads, params, fields, apply)
        executor = self.executor
        if executor == "compiled":  # one that is empty here, and not elsewhere, would be compiled for alone
            self.executor = None
        try:
            recipe = program(details(segment, absent(fields)), False, False, False, *segment.declarations, form="single")
            # a derivative with respect to a number is a sum over all parts
            followed = self.mode != "program" and (self.executor != "leaf" or torch.is_grad_enabled() or maths.transforming())
            run = self.in_part if recipe.elementwise and not followed else self.in_full
            like = [own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.tensors]
            grads = sharded.alike(grads, params, like, "number {}".format)  # a whole transform may have spread them otherwise
            return run(segment, grads, params, fields, apply)
        finally:
            self.executor = executor

    def in_part(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Sharded tensors: what is elementwise, on the parts that are here."""
        with torch.no_grad():  # a part is the very tensor, then, and not a view of it
            inside = [[[sharded.local(x) for x in c] for c in own] for own in fields]
            given = [sharded.local(g) for g in grads], [sharded.local(p) for p in params]
            found, inner = self.any_of(segment, *given, inside, apply)
            updates = [wrapped(x, y, p) for x, y, p in zip(found, given[1], params)]
            news = [
                [
                    x if x is None or (scalar and self.mode != "leaf") else [wrapped(*row) for row in zip(x, y, old)]
                    for x, y, old, scalar in zip(*columns, info.scalars)
                ]
                for columns, (_, _, info) in zip(zip(inner, inside, fields), segment.items)
            ]
        if self.overwrites and self.mode != "traced":
            columns = [own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.columns]
            written = [*(params if apply else ()), *[x for c in columns for x in c if sharded.is_sharded(x)]]
            torch.autograd.graph.increment_version(written)
        return updates, news

    def in_full(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Sharded tensors: what must see whole ones, on each of them in turn, by every process."""
        before, donate = (self.donate, self.write), self.overwrites
        self.donate = self.write = False  # what is here in full may be the memory of one that is not to be written yet
        updates: list[Any] = []
        news: list[list[Any]] = [[None] * len(own) for own in fields]

        def spread(x: Any, given: Any, old: Any, like: Any) -> Any:
            return old if x is given else sharded.spread(x, like)

        for k, (g, p) in enumerate(zip(grads, params)):
            row = [[[sharded.whole(c[k])] for c in own] for own in fields]
            g_whole = sharded.whole(g)
            (update,), found = self.any_of(segment, [g_whole], [sharded.whole(p)], row, apply)
            updates.append(written(spread(update, g_whole, g, p), p, donate and apply))
            for columns, own, given, new, (_, _, info) in zip(news, fields, row, found, segment.items):
                for f, (x, scalar) in enumerate(zip(new, info.scalars)):
                    if x is None:
                        continue
                    if scalar and self.mode != "leaf":
                        columns[f] = x  # the same for all of a bucket
                        continue
                    columns[f] = columns[f] or []
                    old = own[f][k]
                    columns[f].append(x[0] if scalar else written(spread(x[0], given[f][0], old, old), old, donate))
        self.donate, self.write = before
        return updates, news

    @property
    def overwrites(self) -> bool:
        """Whether this call writes in place: what was given away, where nothing is recorded."""
        return self.write if self.mode == "leaf" else self.donate

    def any_of(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Tensors of one process, which may still not be plain."""
        columns = [own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.columns]
        usual = plain(grads, params, *columns, optional=True)
        return (self.together if usual else self.one_by_one)(segment, grads, params, fields, apply)

    def one_by_one(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Tensors of any type, one after the other, out of place. Updates are added at last, and in place where the parameters
        were given away: that is what every type of parameters must know."""
        complex_ = params[0].is_complex()
        given = self.in_reals(segment, grads, params, fields) if complex_ else (grads, params, fields)
        columns = [(j, f) for j, (_, _, info) in enumerate(segment.items) for f in info.columns]
        like = [given[2][j][f] for j, (_, _, info) in enumerate(segment.items) for f in info.tensors]
        dtype = given[1][0].dtype
        mixed = not all([x is None or x.dtype == dtype for c in like for x in c]) or encodes(segment, fields)
        news: list[list[Any]]
        if mixed or self.executor == "leaf":
            write, self.write = self.write, False
            updates, news = self.leaf(segment, *given, False)
            self.write = write
        else:
            recipe = details(segment, absent(fields))
            run = runner(recipe, False, False, False, *segment.declarations, form="single")
            rows = [[[c[k] for c in own] for own in given[2]] for k in range(len(params))]
            made = [self.one(run, segment, g, p, row) for g, p, row in zip(*given[:2], rows)]
            updates = [u for u, _ in made]
            news = [[[new[j][f] for _, new in made] for f in range(len(own))] for j, own in enumerate(fields)]
        if complex_:
            updates, news = imaginary(updates), self.out_of_reals(segment, news)
        for j, (_, _, info) in enumerate(segment.items):
            for f, (column, scalar) in enumerate(zip(news[j], info.scalars)):
                if not column or column[0] is None:
                    news[j][f] = None
                elif scalar and self.mode != "leaf":
                    news[j][f] = column[0]
        if apply:
            params = params if self.overwrites else [p.clone() for p in params]
            for p, u in zip(params, updates):
                p.add_(u)  # what it returns may be the same by another name
            updates = list(params)
        else:  # they are handed out; what they may be is given away at the next step, or was never ours
            taken = {id(x) for c in (grads, *[x[j][f] or () for x in (fields, news) for j, f in columns]) for x in c}
            updates = [u.clone() if id(u) in taken else u for u in updates]
        given_grads = set(map(id, grads))
        for j, f in columns:
            if news[j][f] is not None:
                column = [x.clone() if id(x) in given_grads else x for x in news[j][f]]
                news[j][f] = [written(x, old, self.overwrites) for x, old in zip(column, fields[j][f])]
        return updates, news

    def execute(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """Run these links, in the way that suits the tensors; what it writes in place is below autograd's sight."""
        given = (segment, grads, params, fields)
        below = BelowAutograd  # nothing requires grad; to ask each tensor costs a tenth of a step
        if self.executor == "compiled":
            with below():
                found = self.fused(*given) if self.fuses(segment, apply) else None
            return found or self.packed(*given, apply) or self.program(*given, apply)
        with below():
            return (self.packed(*given, apply) if self.executor is None else None) or self.program(*given, apply)

    # -- mode: leaf

    def leaf(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """The leaf functions themselves, one parameter after the other."""
        out: list[Any] = []
        news: list[list[Any]] = [[[] for _ in columns] for columns in fields]
        for k, (g, p) in enumerate(zip(grads, params)):
            u, dtype = g, p.dtype
            wide = widest(dtype, [own[f][k] for (_, _, info), own in zip(segment.items, fields) for f in info.tensors])
            if encodes(segment, fields):  # numbers that are kept in few bits are computed with in many
                wide = torch.promote_types(wide, torch.float32)
            if wide != dtype:  # a state of higher precision than its parameter: the mathematics is done in the state's
                u, p = g.to(wide), p.to(wide)
            if segment.scaled and self.factor is not None:
                u = (u * self.factor).to(u.dtype)
            for (_, value, info), columns, new in zip(segment.items, fields, news):
                old = [c[k] for c in columns]
                given = [x.to(wide) if like and x is not None else x for x, like in zip(old, info.like)]
                was = [u, p, *given]
                u, state = leaf_update(value, info, u, given, p)
                *state, u = apart([*state, u], was)  # what is given away is written to below, and the rest is someone else's
                write = self.write and not (torch.is_grad_enabled() and requires_grad((u, *state)))
                for column, x, y, like in zip(new, state, old, info.like):
                    column.append(x if x is None or not like else y.copy_(x) if write else x.to(y.dtype))
            if apply:
                u = p + u
                if self.write and not (torch.is_grad_enabled() and u.requires_grad):
                    u = params[k].copy_(u)
            out.append(u if u.dtype == dtype else u.to(dtype))
        return out, news

    # -- mode: single

    def single(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """The program of one tensor, which can be differentiated and batched: parameter by parameter, or small ones as one."""
        dtype = params[0].dtype
        like = [own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.tensors]
        narrow = dtype.itemsize < 4 and encodes(segment, fields)
        if narrow or not all([x is None or x.dtype == dtype for column in like for x in column]):
            return self.leaf(segment, grads, params, fields, apply)  # in the widest dtype
        recipe = details(segment, absent(fields))
        run = runner(recipe, apply, False, False, *segment.declarations, form="single")
        counters = [c for (_, _, info), own in zip(segment.items, fields) for c, s in zip(own, info.scalars) if s]
        together = all([agree(c) or self.equal(c) for c in counters])
        stacked = self.stacked(segment, recipe, grads, params, fields, apply) if together else None
        if stacked is not None:
            return stacked
        if (
            together
            and not torch.compiler.is_compiling()  # the compiler finds out for itself
            and joinable(params, program(recipe, apply, False, False, *segment.declarations, form="single"))
        ):
            flats = [
                [c[0] if s or c[0] is None else flattened(c) for c, s in zip(own, info.scalars)]
                for (_, _, info), own in zip(segment.items, fields)
            ]
            update, news = self.one(run, segment, flattened(grads), flattened(params), flats)
            many = [
                [[x] * len(params) if s or x is None else parted(x, params) for x, s in zip(new, info.scalars)]
                for (_, _, info), new in zip(segment.items, news)
            ]
            return parted(update, params), many
        rows = [[[c[k] for c in own] for own in fields] for k in range(len(params))]
        found = [self.one(run, segment, g, p, row) for g, p, row in zip(grads, params, rows)]
        result = [[[new[j][f] for _, new in found] for f in range(len(own))] for j, own in enumerate(fields)]
        if together:
            for columns, (_, _, info) in zip(result, segment.items):
                for f, scalar in enumerate(info.scalars):
                    columns[f] = columns[f][:1] * len(params) if scalar else columns[f]
        return [u for u, _ in found], result

    def stacked(
        self, segment: Segment, recipe: Any, grads: Any, params: Any, fields: Any, apply: bool
    ) -> tuple[Any, Any] | None:
        """All members of a vmap, and all parameters, at once, if that is possible."""
        if self.level is None:
            return None
        columns, places, news = self.arranged(segment, fields)
        numbers = segment.numbers if segment.numbers is not None else self.numbers(segment, fields)
        found = batches.run(self.level, recipe, segment.declarations, (grads, params, columns), numbers, apply)
        if found is None:
            return None
        for (j, f), x in zip(places, found[1:]):
            news[j][f] = x
        for own, new in zip(fields, news):
            for f, (old, x) in enumerate(zip(own, new)):
                new[f] = x if x is None or isinstance(x, list) else [self.counted(old[0], x)] * len(params)
        return list(found[0]), news

    def one(self, run: Any, segment: Segment, g: Tensor, p: Tensor, fields: list[list[Any]]) -> tuple[Tensor, list[list[Any]]]:
        """The program on one tensor, with one value of each field: the update, or the parameter, and the new values."""
        given: list[Any] = []
        places: list[tuple[int, int]] = []
        news: list[list[Any]] = [[None] * len(own) for own in fields]
        for j, ((_, value, info), own) in enumerate(zip(segment.items, fields)):
            for f, (x, scalar) in enumerate(zip(own, info.scalars)):
                if x is None:
                    continue
                if scalar and value.declaration.state is None:
                    news[j][f] = self.counted(x, self.number(x) + 1)
                    continue
                given.append(self.number(x) if scalar else x)
                places.append((j, f))
        numbers = segment.numbers
        if numbers is None:
            numbers = self.numbers(segment, [[[x] for x in own] for own in fields])
        update, *results = run(g, p, *given, *numbers)
        for (j, f), x in zip(places, results):
            news[j][f] = self.counted(fields[j][f], x)
        return stored(p, update), news

    def counted(self, old: Tensor, x: Any) -> Tensor:
        """The new value of a field; equal numbers are one tensor."""
        if isinstance(x, Tensor):
            return stored(old, x)
        key = (x, old.dtype, old.device)
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = stored(old, x)
        return found

    # -- mode: program

    def packed(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any] | None:
        """Many small tensors as one, if that is possible."""
        kernel = apply and segment.kernel is not None and self.executor != "compiled"
        if kernel or not (small(params) and (self.seen or small(grads))):
            return None  # on small tensors a kernel costs less than to gather them
        recipe = program(details(segment, absent(fields)), False, True, self.donate, *segment.declarations)
        columns = [(j, f) for j, (_, _, info) in enumerate(segment.items) for f in info.tensors if fields[j][f][0] is not None]
        if not recipe.elementwise or not recipe.parts or encodes(segment, fields):
            return None
        lists = [grads, params, *[fields[j][f] for j, f in columns]]
        dtype, shapes = params[0].dtype, [p.shape for p in params]
        if not self.seen and not all(
            [[x.dtype for x in xs].count(dtype) == len(shapes) and [x.shape for x in xs] == shapes for xs in lists]
        ):
            return None
        scratch = borrow(params, shapes)
        try:
            return self.on_scratch(segment, scratch, grads, params, fields, columns, apply, recipe.reads_params)
        finally:
            give_back(scratch)

    def on_scratch(
        self, segment: Segment, scratch: Scratch, grads: Any, params: Any, fields: Any, columns: Any, apply: bool, reads: bool
    ) -> tuple[Any, Any]:
        """The same, in memory that was made for it."""
        flats: list[list[Any]] = [[c[:1] for c in own] for own in fields]
        given = [list(own) for own in fields]
        for j, f in columns:
            flat = scratch.joined(given[j][f])
            if flat is None:
                given[j][f], flat = scratch.join(given[j][f])
            flats[j][f] = self.pieces(flat)
        foreach_copy_(scratch.grads, grads)
        add = apply and not reads  # the updates to the parameters where these are
        if reads:
            foreach_copy_(scratch.params, params)
        own, self.own = self.own, True
        out, news = self.program(segment, self.pieces(scratch.grad), self.pieces(scratch.param), flats, apply and not add)
        self.own = own
        for j, f in columns:
            if news[j][f][0] is flats[j][f][0]:
                news[j][f] = given[j][f]
            else:
                news[j][f] = split(torch.cat(news[j][f]), params)
        if add:
            overwrite(self.pieces(scratch.grad), out)
            if self.donate:
                foreach_add_(params, scratch.grads)
                return params, news
            return list(foreach_add(params, scratch.grads)), news
        if apply and self.donate:
            foreach_copy_(params, scratch.params)
            return params, news
        return split(torch.cat(out), params), news

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """One long tensor as a program takes it: in pieces that fit the cache; a kernel sees it once anyway."""
        return [flat] if self.executor == "compiled" else pieces(flat)

    def program(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """All parameters at once: the tail of the chain as a fused kernel if there is one, the rest as a program."""
        kernel = segment.kernel if self.fuses(segment, apply) else None
        if kernel is not None and self.mode == "program" and self.executor != "compiled":
            pays = self.donate or kernel.copies or self.executor == "fused"
            found = self.fused(segment, grads, params, fields) if pays else None
            if found is not None:
                return found
        return self.foreach(segment, grads, params, fields, apply)

    def foreach(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """The traced program of these links."""
        dtype = params[0].dtype
        columns, places, news = self.arranged(segment, fields)
        kept = [c for c, place in zip(columns, places) if isinstance(c, list) and place not in segment.encoded]
        mixed = not all([[x.dtype for x in c].count(dtype) == len(c) for c in kept])
        mixed |= dtype.itemsize < 4 and encodes(segment, fields)
        if mixed and not (self.executor == "compiled" and self.mode == "program"):
            return self.promoted(segment, grads, params, fields, apply)
        recipe = details(segment, absent(fields))
        numbers = self.all_numbers(segment, fields)
        if self.mode == "program":
            given, found = (grads, params, columns), None
            if self.executor == "compiled":
                found = compiled.run(recipe, segment.declarations, given, numbers, apply=apply, donate=self.donate)
                if found is None and mixed:
                    return self.promoted(segment, grads, params, fields, apply)
            updates, *results = found or calculate(
                recipe, segment.declarations, given, numbers,
                apply=apply, own=self.own, donate=self.donate, kernels=self.merges(segment, recipe, given, apply),
            )  # fmt: skip
        else:
            updates, *results = runner(recipe, apply, self.own, self.donate, *segment.declarations)(
                grads, params, *columns, *numbers
            )
        if any([isinstance(x, Tensor) for x in (*columns, *numbers)]):  # a 0-d parameter is promoted by a 0-d number
            own = [True, *[place not in segment.encoded for place in places]]
            updates, *results = [
                cast(x, dtype) if yes and isinstance(x, (list, tuple)) else x for yes, x in zip(own, (updates, *results))
            ]
        for (j, f), x in zip(places, results):
            news[j][f] = list(x) if isinstance(x, tuple) else x
        return list(updates) if isinstance(updates, tuple) else updates, news

    def merges(self, segment: Segment, recipe: Any, given: tuple[list[Tensor], list[Tensor], list[Any]], apply: bool) -> bool:
        """Whether a kernel computes several lines of this program, and may be trusted with these tensors."""
        grads, params, columns = given
        p = params[0]
        if self.executor is not None or not p.is_cpu or p.dtype not in MERGED_DTYPES:
            return False
        if not program(recipe, apply, self.own, True, *segment.declarations, form="kernels").merged:
            return False
        return ordinary([grads, params, *[c for c in columns if isinstance(c, list)]], p.dtype)

    def arranged(self, segment: Segment, fields: Any) -> tuple[list[Any], list[tuple[int, int]], list[list[Any]]]:
        """The fields that a program takes, lists and numbers; the link and the number of each; and the new fields, empty but
        for the counters of links without a state of their own, which no program sees."""
        columns: list[Any] = []
        places: list[tuple[int, int]] = []
        news: list[list[Any]] = [[None] * len(own) for own in fields]
        for j, ((_, value, info), own) in enumerate(zip(segment.items, fields)):
            for f, (c, scalar) in enumerate(zip(own, info.scalars)):
                if c[0] is None:
                    continue
                if scalar and value.declaration.state is None:
                    news[j][f] = self.number(c[0]) + 1
                    continue
                columns.append(self.number(c[0]) if scalar else c)
                places.append((j, f))
        return columns, places, news

    def all_numbers(self, segment: Segment, fields: Any) -> list[Any]:
        """The numbers that a program takes, but for counters."""
        numbers = segment.numbers if segment.numbers is not None else self.numbers(segment, fields)
        return [self.factor, *numbers] if segment.scaled else numbers

    def numbers(self, segment: Segment, fields: Any) -> list[Any]:
        """The hyperparameters in order, as the arguments of a program."""
        found: list[Any] = []
        for (_, value, info), own in zip(segment.items, fields):
            count = own[info.step][0] if info.step >= 0 else None
            for name in value.declaration.hypers:
                x = self.lower(value.arguments[name], count)
                found += x if isinstance(x, tuple) else () if x is None else (x,)
        return found

    def promoted(self, segment: Segment, grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """State and parameters of different dtypes: promoted by torch's rules, leaf by leaf, and stored as they were."""
        updates, news = self.leaf(segment, grads, params, fields, apply)
        for (_, _, info), old, new in zip(segment.items, fields, news):
            for f, scalar in enumerate(info.scalars):
                if scalar:
                    new[f] = new[f][0]
                elif self.donate and old[f][0] is not None:
                    new[f] = overwrite(old[f], new[f])
        return overwrite(params, updates) if apply and self.donate else updates, news

    # -- fused kernels

    def fused(self, segment: Segment, grads: Any, params: Any, fields: Any) -> tuple[Any, Any] | None:
        """The program of what comes first, and a kernel for the tail: in place, on copies of what was not given away."""
        head, tail, n = segment.head, segment.tail, len(segment.items) - len(segment.tail.items)
        if not tail.kernel.computes(params[0]) or not fits(tail, grads, params, fields[n:]):  # type: ignore[union-attr]
            return None
        states: dict[str, list[Tensor]] = {}
        news: list[list[Any]] = []
        before: Any = 0
        hypers, step = tail.hypers, {}
        for (_, value, info), own in zip(tail.items, fields[n:]):
            new = list(own)
            for f in info.tensors:
                states[info.names[f]] = own[f]
            if info.step >= 0:
                count = own[info.step][0]
                number = self.number(count)
                new[info.step] = number + 1
                if value.declaration.state is not None:
                    before, step["step"] = number, functools.cache(functools.partial(stored, count, number + 1))
            news.append(new)
        if tail.numbers is None:
            hypers = dict(hypers)
            for (_, value, info), own in zip(tail.items, fields[n:]):
                count = own[info.step][0] if info.step >= 0 else None
                for name in value.declaration.hypers:
                    hypers[name] = self.lower(value.arguments[name], count)

        def kernel(params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]) -> None:
            segment.kernel.run(params, grads, {**states, **step}, hypers, before)  # type: ignore[union-attr]

        heads = self.in_blocks(segment, kernel, grads, params, fields[:n], states)
        out = params
        if heads is None:
            heads = []
            if segment.first:
                grads, heads = self.foreach(head, grads, params, fields[:n], False)
            if not self.donate:
                out, states = clones(params), {name: clones(x) for name, x in states.items()}
            kernel(out, grads, states)
        for (_, _, info), new in zip(tail.items, news):
            for f in info.tensors:
                new[f] = states[info.names[f]]
        return out, heads + news

    def in_blocks(
        self, segment: Segment, kernel: Any, grads: Any, params: Any, fields: Any, states: dict[str, list[Tensor]]
    ) -> list[list[Any]] | None:
        """The same on large tensors, if what comes first is elementwise and all memory was given away; its new fields."""
        if not self.donate or not segment.first or chunks(params) is None:
            return None
        columns, places, news = self.arranged(segment.head, fields)
        lists = [grads, params, *states.values(), *[c for c in columns if isinstance(c, list)]]
        if not ordinary(lists, params[0].dtype):
            return None
        head = program(details(segment.head, absent(fields)), False, False, True, *segment.head.declarations)
        if not head.elementwise:
            return None
        results = through(head, kernel, (grads, params, columns, states), self.all_numbers(segment.head, fields))
        for (j, f), x in zip(places, results):
            news[j][f] = x
        return news

    # -- numbers

    def number(self, x: Tensor) -> Any:
        """A counter as a number: a float if it is on the CPU, else a tensor in the precision numbers are computed in."""
        if self.mode == "traced" or torch.compiler.is_compiling():
            return lifted(x)
        found = self.read.get(id(x))
        if found is None:
            found = self.read[id(x)] = self.looked_up(x)
        return found

    def looked_up(self, x: Tensor) -> Any:
        """The same, of a tensor that was not met before."""
        if not x.is_cpu:
            return lifted(x)
        if self.mode == "program":
            return x.item()
        if dispatch_mode_count() > 0 or maths.followed(x):
            value = None if self.level is None else self.level.read(x)
            return value if isinstance(value, float) else lifted(x)
        with DisableFuncTorch():  # nothing that is running has anything to do with this tensor
            return maths.bottom(x)[0].item()

    def equal(self, counters: list[Any]) -> bool:
        """Whether these are the same number for each member of a batch."""
        if self.level is None or counters[0] is None:
            return False
        first, *others = [self.level.read(x) for x in counters]
        if not isinstance(first, Tensor):
            return first is not None and all([not isinstance(x, Tensor) and x == first for x in others])
        with DisableFuncTorch():
            return all([isinstance(x, Tensor) and torch.equal(x, first) for x in others])

    def value(self, x: Schedule, count: Tensor | None) -> Any:
        """What a schedule gives at this counter."""
        key = None if torch.compiler.is_compiling() else (id(x), id(count))
        found = self.scheduled.get(key)
        if found is None:
            step = 0 if count is None else self.number(count)
            found = count, x(int(step) if isinstance(step, float) else step)
            if key is not None and self.looking():
                self.scheduled[key] = found
        return found[1]

    def lower(self, x: Any, count: Tensor | None) -> Any:
        """A hyperparameter as a program takes it; `count` is the counter that schedules are called with."""
        if isinstance(x, tuple):
            return tuple([self.lower(y, count) for y in x])
        if isinstance(x, Schedule):
            return self.lower(self.value(x, count), count)
        if isinstance(x, Tensor):
            single(x)
            if x.requires_grad and self.looking():
                self.record()
            return x.item() if self.mode == "program" and x.is_cpu else x.reshape(()) if x.dim() else x
        return x

    # -- counters

    def settle(self) -> None:
        """Store the new counters, one tensor for all parameters that agree; in place where no one else holds it."""
        if not self.writes:
            return
        if self.donate and self.alone and all([rows is None for _, _, rows, _ in self.writes]):  # None: they share one already
            for i, f, _, x in self.writes:
                counter = self.states[i][f][0]
                counter.copy_(x) if isinstance(x, Tensor) else counter.fill_(x)
            return
        made: dict[Any, Tensor] = {}
        olds = [self.states[i][f][0 if rows is None else rows[0]] for i, f, rows, _ in self.writes]
        for (i, f, rows, x), old, place in zip(self.writes, olds, first_places(olds)):
            column = self.states[i][f]
            value: Any = x
            if isinstance(x, Tensor):  # buckets of the same counter count to the same number
                value = ("step", place) if f == self.fields[i].step else id(x)
            key = (value, f, old.dtype, old.device)
            new = made.get(key)
            if new is None:
                new = made[key] = stored(old, x)
            self.states[i][f] = [new] * len(column) if rows is None else put(column, rows, [new] * len(rows))


# ----------------------------------------------------------------------------------------------------------------- nesting


class Inner:
    """A transform inside another, as the function of that one sees it.

    It is pure, as a `Transform` is, but takes and returns lists over the parameters; its state is a value to be passed on.
    Extra arguments and masks are seen to.
    """

    def __init__(self, call: Call, groups: Sequence[Group], rows: list[int] | None, apply: bool) -> None:
        self._call: Any = call
        self._apply = apply  # what are called updates here are new parameters, then
        self._rows, self._groups, self._fields = rows, groups, groups[0].plan.fields
        if rows is not None:
            below = [len([k for k in rows if k < g.rows.start]) for g in groups] + [len(rows)]
            self._groups = [Group(g.plan, range(*ends)) for g, *ends in zip(groups, below, below[1:])]

    def update(self, gs: list[Tensor], state: Any, params: list[Tensor], *, donate: bool = False) -> tuple[list[Tensor], Any]:
        """The updates and the new state.

        Args:
            gs: the gradients.
            state: what the field `inner` of the state holds, or what the last update returned.
            params: the parameters.
            donate: promises that `state` will not be looked at again, so that its memory can be reused if the user gave it
                away.
        """
        return self._run(gs, state, params, self._apply, donate)

    def step(self, gs: list[Tensor], state: Any, params: list[Tensor], *, donate: bool = False) -> tuple[list[Tensor], Any]:
        """The new parameters and the new state, for a function that `moves`: `update`, and to apply the updates.

        With `donate` it promises that neither `state` nor `params` will be looked at again.
        """
        return self._run(gs, state, params, True, donate and self._call.moved)

    def _run(self, gs: Any, state: Any, params: Any, apply: bool, donate: bool) -> tuple[list[Tensor], Any]:
        call, rows = self._call, self._rows
        made = Call(
            list(gs), list(params), [list(s) for s in state], lambda masks: pick(call.mask(masks), rows), call.mode,
            apply=apply, donate=donate and call.donate, alone=call.alone and rows is None, executor=call.executor,
            plain=call.plain, extras={name: call.extra(name, rows) for name in call.extras},
        )  # fmt: skip
        result = made.run(self._groups)
        if made.mode != call.mode:
            call.record()
        return result

    def when(
        self, flag: Any, gs: list[Tensor], state: Any, params: list[Tensor], otherwise: list[Tensor] | None = None
    ) -> tuple[list[Tensor], Any]:
        """`update` where `flag` holds; elsewhere the updates are `otherwise`, and the state stays as it is.

        Where the flag can be read (on a CPU, outside `torch.func`), what is not wanted is not computed. `state` must not be
        looked at again.

        Args:
            flag: a bool, or a 0-d tensor of one, which may differ in each member of a batch.
            gs: the gradients.
            state: as in `update`.
            params: the parameters.
            otherwise: by default nothing, so that the parameters keep every bit.
        """
        call, flag = self._call, self.read(flag)
        if flag is True:
            return self.update(gs, state, params, donate=True)
        if self._apply:
            otherwise = params if otherwise is None else [(p + u).to(p.dtype) for p, u in zip(params, otherwise)]
        elif otherwise is None:
            otherwise = [torch.zeros_like(g).neg() for g in gs]  # minus zero: adding zero would make 0 of -0
        if flag is False:
            return otherwise, state
        if call.mode != "program":  # the derivative of what is not taken must be finite, too
            gs = maths.select(flag, gs, [torch.zeros_like(g) for g in gs])
        us, new = self.update(gs, state, params)
        after = maths.select(flag, new, state)
        return maths.select(flag, us, otherwise), [call.reused(old, x, f) for old, x, f in zip(state, after, self._fields)]

    def plus(self, xs: list[Tensor], ys: list[Tensor], k: Any = 1) -> list[Tensor]:
        """Tensors of the state plus a `k`-th of others; in their own memory, if that was given away. Do not use them again."""
        if self._call.mode == "program" and isinstance(k, Tensor) and k.is_cpu:
            k = k.item()
        if self._call.mode != "program" or isinstance(k, Tensor) or not plain(xs, ys):
            return [(x + y / k).to(x.dtype) for x, y in zip(xs, ys)]
        if not self._call.donate:
            return list(foreach_add(xs, ys, alpha=1 / k))
        foreach_add_(xs, ys, alpha=1 / k)
        return xs

    def emptied(self, xs: list[Tensor], used: Any) -> list[Tensor]:
        """Zeros in place of tensors of the state, in their own memory if it was given away and nothing else is in it.

        Args:
            xs: the tensors, which must not be used again.
            used: the updates and the state that `update` has made of them. What it does in place is in memory of its own.
        """
        own = self._apply and not any([stage.whole for stage in self._groups[0].plan.stages])
        if self._call.mode == "program" and self._call.donate and plain(xs) and (own or not shared(xs, used)):
            foreach_zero_(xs)
            return xs
        return [torch.zeros_like(x) for x in xs]

    def read(self, flag: Any) -> Any:
        """A flag as a bool, if there is no one to wait for: on a CPU, outside `torch.func` and `torch.compile`."""
        if isinstance(flag, Tensor):
            return bool(flag) if self._call.mode == "program" and flag.is_cpu else flag.bool()
        return bool(flag)

    def state(self, states: Sequence[Any]) -> list[Any]:
        """The state of these links, of the parameters that there are."""
        return [[pick(c, self._rows) if leaf else c for c, leaf in zip(s, f.leaves)] for s, f in zip(states, self._fields)]

    def put(self, olds: Sequence[Any], news: Sequence[Any]) -> list[Any]:
        """The new state, with that of the other parameters as it was."""
        if self._rows is None:
            return [list(s) for s in news]
        return [
            [put(x, self._rows, y) if leaf else y for x, y, leaf in zip(old, new, f.leaves)]
            for old, new, f in zip(olds, news, self._fields)
        ]


def shared(xs: list[Tensor], used: Any) -> bool:
    """Whether any of these tensors, or a view of it, is found elsewhere, or may be."""
    found = [y for y in tree_leaves(used) if isinstance(y, Tensor)]
    if not plain(xs, found):
        return True  # what is not plain need not say where its numbers are
    memory = {x.untyped_storage()._cdata for x in xs}
    return any([y.untyped_storage()._cdata in memory for y in found])


def check_nested(d: Any, after: Any, count: int) -> None:
    """Refuse what a nested transform returned in place of its state and that of so many links."""
    if not isinstance(after, d.state) or not isinstance(after.inner, list) or len(after.inner) != count:
        raise TypeError(
            f"{d.name} must return (updates, {d.state.__name__}) with the state of the inner transform in its field 'inner', "
            f"but its second value is {after!r}."
        )


# --------------------------------------------------------------------------------------------------------------- helpers


def requires_grad(x: Any) -> bool:
    """Whether autograd follows any of the tensors in what a function has returned."""
    if isinstance(x, Tensor):
        return x.requires_grad
    if isinstance(x, (list, tuple)):
        return any([y.requires_grad if isinstance(y, Tensor) else requires_grad(y) for y in x if y is not None])
    return isinstance(x, dict) and any(map(requires_grad, x.values()))


def agree(counters: list[Any]) -> bool:
    """Whether all counters are the same number, as far as can be seen without reading any."""
    first = counters[0]
    if all([x is first for x in counters]):
        return True
    if torch.compiler.is_compiling() or any([x is None or x.requires_grad for x in counters]):
        return False
    tensor, levels = maths.bottom(first)
    return all([maths.bottom(x)[0] is tensor and maths.bottom(x)[1] == levels for x in counters[1:]])


def choose(executor: Executor | None, *tensors: Iterable[Any]) -> Mode:
    """How leaf functions are run in this call."""
    if executor == "leaf" or maths.transforming():
        return "leaf"
    if torch.is_grad_enabled() and any([any([t is not None and t.requires_grad for t in x]) for x in tensors]):
        return "leaf"
    return "traced" if torch.compiler.is_compiling() or dispatch_mode_count() > 0 else "program"


def leaf_update(value: Primitive, info: Fields, g: Tensor, columns: list[Any], p: Tensor) -> tuple[Tensor, list[Any]]:
    """One leafwise transform on one parameter: its function on bare tensors. State is stored in the dtype it came in."""
    d = value.declaration
    count = lifted(columns[info.step]) if info.step >= 0 else None
    hypers = {n: evaluated(x, count) if n in d.intervals else x for n, x in value.arguments.items()}
    if d.state is None:
        u, _ = call(d, g, None, p, hypers)
        return spread(g, u), [] if count is None else [stored(columns[0], count + 1)]
    state = d.state(*[lifted(c) if scalar and c is not None else c for c, scalar in zip(columns, info.scalars)])
    u, new = call(d, g, state, p, hypers)
    return spread(g, u), [x if c is None else stored(c, spread(c, x)) for c, x in zip(columns, new)]


def apart(results: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """What a leaf function returns, each tensor in memory that it shares with no other, nor with what was given."""
    held = {maths.memory(x) for x in given if isinstance(x, Tensor)}
    found: list[Any] = []
    for x in results:
        if isinstance(x, Tensor):
            if not plain([maths.bottom(x)[0]]):
                x = x.clone()  # nobody knows where it is
            elif maths.memory(x) in held or 0 in x.stride():
                x = x.clone(memory_format=torch.contiguous_format)
            held.add(maths.memory(x))
        found.append(x)
    return found


def lifted(x: Tensor) -> Tensor:
    """A counter in the precision that numbers are computed in."""
    return x.to(maths.precise(x.device))


def stored(old: Tensor, x: Any) -> Tensor:
    """The new value of a state field, in the dtype and on the device of the old."""
    if isinstance(x, Tensor):
        return x if x.dtype == old.dtype else x.to(old.dtype)
    return torch.full((), x, dtype=old.dtype, device=old.device)


def spread(like: Tensor, x: Any) -> Any:
    """What a leaf function returns in the place of a tensor, in its shape."""
    if isinstance(x, Tensor):
        return x.expand(like.shape) if x.dim() < like.dim() else x
    return torch.full_like(like, x) if like.dim() else x


def demand_kernel(segment: Segment, params: list[Tensor]) -> None:
    """Refuse to do without a kernel, unless it is only the memory layout, or the type, of a tensor that is in the way."""
    odd = [p for p in params if p.dtype not in FUSED_DTYPES]
    if segment.kernel is None or odd:
        p = odd[0] if odd else params[0]
        raise RuntimeError(
            "fused=True needs a chain that ends in what a torch._fused_* kernel computes, on floating-point tensors, with "
            f"plain numbers as hyperparameters; {segment.names or 'an empty chain'} on {p.dtype} ({p.device}) is not that. "
            "Leave fused out, and the fastest way that fits is chosen."
        )


def fits(segment: Segment, grads: list[Tensor], params: list[Tensor], fields: Any) -> bool:
    """Whether a kernel may be given these tensors: it reads memory in order, whatever sizes and strides say."""
    dtype, shapes = params[0].dtype, [p.shape for p in params]
    lists = [grads, params, *[own[f] for (_, _, info), own in zip(segment.items, fields) for f in info.tensors]]
    for x in lists:
        if not plain(x) or [t.dtype for t in x].count(dtype) != len(x) or [t.shape for t in x] != shapes:
            return False
    return all([all(map(Tensor.is_contiguous, x)) for x in lists]) or all([same_layout(ts) for ts in zip(*lists)])


def ordinary(lists: list[list[Tensor]], dtype: torch.dtype) -> bool:
    """Whether there is nothing special about any tensor: it is plain, of this dtype, and in one piece."""
    return plain(*lists) and all([all([x.dtype is dtype and x.is_contiguous() for x in xs]) for xs in lists])


def wrapped(x: Tensor, old: Tensor, like: Tensor) -> Tensor:
    """A part of a sharded tensor as such a tensor: as the same, if it is the same part."""
    return like if x is old else sharded.wrapped(x, like)


def written(x: Any, old: Any, donate: bool) -> Any:
    """A new value, in the place of the old one if that was given away."""
    if not donate or x is old or x.shape != old.shape:
        return x
    old.copy_(x)
    return old


def one(values: list[Any], mode: str) -> bool:
    """Whether all are one and the same object."""
    if mode == "traced":
        return all([x is values[0] for x in values])
    return len(set(map(id, values))) == 1
