"""One update of all parameters: lists in, lists out.

`run_chain` goes through the stages of a plan. A stage is a run of consecutive leafwise transforms, or one whole transform. The
parameters of a leafwise stage are sorted into *buckets*, which differ in what a program cannot take as an input: dtype,
device, type, masks, the number of updates so far. Almost always there is one bucket, and finding that out is all it costs.
Each bucket is a `Task`, and the first executor that takes a task runs it.

What the functions of a chain bring in by themselves (a schedule, a whole transform, an extra argument) may have a history that
no input has. Where autograd looks on, `run_chain` looks at what comes out of them, and records everything from the first of
them on that requires grad.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths, sharded
from purestep._core.lists import alike, first_places, overwrite, pick, put
from purestep._core.plain import plain
from purestep._core.primitives import EmptyState, Fields, Link, as_begun, fresh_state
from purestep._core.torch_api import dispatch_mode_count
from purestep._engine.counters import CounterWrite, commit
from purestep._engine.nesting import Inner, check_nested, reused
from purestep._engine.numbers import Numbers
from purestep._engine.plan import ParamSlice, Plan, Stage
from purestep._engine.rehearsal import rehearse
from purestep._executors import registry as registry  # importing it registers the executors
from purestep._executors.chains import FUSED_DTYPES, FusedChain
from purestep._executors.flat_buffer import COUNT, SIZE
from purestep._executors.leaf_function import STOP, read, requires_grad
from purestep._executors.task import LEAF_BY_LEAF, WATCH, Decided, Env, ExecutorName, Mode, Ownership, Task, execute, run_plain

Mask = Callable[[tuple[Any, ...]], "list[bool]"]
Layout = Callable[[tuple[Any, ...]], "list[tuple[int, bool]]"]
"""For each parameter under some masks, how many numbers it has (a complex one has two) and whether it has a gradient."""


def choose(wanted: ExecutorName | None, *tensors: Iterable[Any]) -> Mode:
    """How leaf functions are run in a call that takes these tensors."""
    if wanted in LEAF_BY_LEAF or maths.transforming():
        return "leaf"
    if torch.is_grad_enabled():
        for xs in tensors:
            for x in xs:
                if x is not None and x.requires_grad:
                    return "leaf"
    return "traced" if torch.compiler.is_compiling() or dispatch_mode_count() > 0 else "program"


class Inputs:
    """The lists of one update. Every parameter has a gradient: the others never get here.

    `states` holds, per transform, a list of its state's fields, and a field is a list over the parameters (or, in a whole
    transform, also a value of its own). `mask` says which of these parameters some masks select. `extras` are the arguments
    that some whole transforms ask for at each update. `layout` is None if there are no parameters without a gradient.
    """

    __slots__ = ("extras", "facts", "grads", "layout", "mask", "params", "plain", "rehearsed", "states", "widened")

    def __init__(
        self,
        grads: list[Any],
        params: list[Any],
        states: list[Any],
        mask: Mask,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        self.grads, self.params, self.states, self.mask, self.extras = grads, params, states, mask, extras or {}
        self.layout: Layout | None = None
        self.plain = False  # whether all tensors are known to be plain
        self.facts: dict[Any, Any] | None = None  # what is known of them: see `Task.facts`
        self.rehearsed = False  # whether a run around this one has called what a user has given: see `rehearse`
        self.widened = False  # whether a transform around this one has changed the parameters' dtypes

    def selected(self, link: Link) -> list[bool] | None:
        """Whether a transform acts on each parameter; None if it acts on all."""
        return self.mask(link.masks) if link.masks else None


class Objective:
    """A loss with its gradients, as a function of the parameters that have a gradient.

    `layout` tells which of all parameters these are: see `Layout`; None if there are no others.
    """

    __slots__ = ("function", "layout")

    def __init__(self, function: Callable[[list[Tensor]], Any], layout: list[tuple[int, bool]] | None) -> None:
        self.function, self.layout = function, layout

    def __call__(self, params: list[Tensor]) -> Any:
        return self.function(params)


def run_chain(groups: Sequence[ParamSlice], inputs: Inputs, env: Env, apply: bool) -> tuple[list[Any], list[Any]]:
    """The new parameters (or the updates), and the new states."""
    if not inputs.params:
        return inputs.grads, inputs.states
    return Run(groups, inputs, env, apply).result()


class Run:
    """What changes while a chain runs."""

    def __init__(self, groups: Sequence[ParamSlice], inputs: Inputs, env: Env, apply: bool) -> None:
        self.groups, self.inputs, self.env, self.apply = groups, inputs, env, apply
        self.plan = groups[0].plan
        self.grads, self.params, self.states = inputs.grads, inputs.params, inputs.states
        self.numbers = Numbers(env)
        self.factor: Any = None  # what the gradients are still to be multiplied by
        self.moved = False  # whether the last transform has applied its updates itself
        self.writes: list[CounterWrite] = []

    def result(self) -> tuple[list[Any], list[Any]]:
        """Run all stages: the new parameters (or the updates), and the new states."""
        last, env, called = len(self.plan.stages) - 1, self.env, -1
        given = env.own, env.writes, env.mode
        if env.own.given and env.overwrites:
            if self.plan.rehearses or self.plan.structure.masked:
                rehearse(self.groups, self.inputs, self.states, self.numbers)
            called = self.plan.last_call
            if called > 0:  # functions of a user's may raise: until the last has returned nothing is overwritten
                env.own, env.writes = env.own._replace(given=False), False
        for n, stage in enumerate(self.plan.stages):
            if n == called and env.mode == given[2]:
                env.own, env.writes, _ = given
            if stage.whole:
                self.scale()
                self.whole(n)
            elif self.moved:
                self.copy_back(self.plan.stages[-2])
            elif stage.stop > stage.start or self.apply:
                self.leafwise(n, self.apply and n == last)
        self.scale()
        if self.writes:
            own = self.env.own
            commit(self.writes, self.states, self.plan.fields, own.given and own.counters)
        return self.grads, self.states

    def copy_back(self, whole: Stage) -> None:
        """Write what the last transform, a whole one, has moved to the parameters, if they were given away."""
        if self.env.wanted == "fused" and whole.inner is None:
            demand_kernel(self.plan.fused_chain(()), self.params)
        new = not self.env.own.copies and not all(map(operator.is_, self.grads, self.params))
        if self.env.own.given and new and not maths.recorded(self.grads + self.params):
            self.grads = overwrite(self.params, self.grads)

    def scale(self) -> None:
        """Multiply the gradients by the number that they are still to be multiplied by."""
        if self.factor is not None:
            factor = self.factor if isinstance(self.factor, Tensor) else torch.tensor(self.factor, dtype=torch.float64)
            self.grads, self.factor = maths.multiply(self.grads, factor), None

    # -- whole transforms

    def whole(self, n: int) -> None:
        """The `n`-th stage, a whole transform, with those that it wraps."""
        stage = self.plan.stages[n]
        i = stage.start
        link, info = self.plan.links[i], self.plan.fields[i]
        fields = self.states[i] = unstopped(self.states[i], info)
        d = link.transform.declaration
        on = self.inputs.selected(link)
        rows = None if on is None else [k for k, yes in enumerate(on) if yes]
        if rows == []:
            return  # none of its parameters has a gradient
        count = fields[info.step] if info.step >= 0 else None
        lower = self.numbers.lower
        arguments = {n: lower(x, count) if n in d.intervals else x for n, x in link.transform.arguments.items()}
        arguments |= {n: extra(self.inputs, self.plan, n, rows) for n in d.extras}
        given: list[Any] = [pick(c, rows) if leaf else c for c, leaf in zip(fields, info.leaves)]
        self.moved = self.apply and n == self.plan.final and rows is None and (d.moves or d.passes)
        inner = None
        if stage.inner is not None:
            plans: list[Any] = [plan.inner[n] for plan, _ in self.groups]
            within = [ParamSlice(plan, rows_) for plan, (_, rows_) in zip(plans, self.groups)]
            arguments[d.inner] = inner = Inner(self, within, rows, self.moved and d.passes, d.ours)
            given.append(inner.state(self.states[i + 1 : stage.stop]))
        state = EmptyState() if d.state is None else d.state(*given)
        if WATCH.decided is not None:
            WATCH.decided.append(Decided(d.name, "whole", pick(self.params, rows), self.env.mode, False, {}))
        gs, ps = pick(self.grads, rows), pick(self.params, rows)
        if d.state_dtype is not None:  # computed as for parameters with the dtype of the state
            own, (gs, ps) = ps, [[as_begun(d, x) for x in xs] for xs in (gs, ps)]
            arguments = {n: at_dtypes(x, own) if n == "value_and_grad" else x for n, x in arguments.items()}
        if "value_and_grad" in arguments:
            layout = None if self.inputs.layout is None else self.inputs.layout(link.masks)
            arguments["value_and_grad"] = Objective(arguments["value_and_grad"], layout)
        new, after = d.function(gs, state, ps, **arguments)
        if self.env.watched and (requires_grad(new) or requires_grad(after)):
            self.env.record()
        if inner is not None:
            check_nested(d, after, stage.stop - i - 1)
            self.states[i + 1 : stage.stop] = inner.put(self.states[i + 1 : stage.stop], after.inner)
            after = reused(self.env, (state, after, new), info)
        self.keep(i, after, rows)
        if d.state_dtype is not None and not d.scales:
            new = like(new, pick(self.params if self.moved or d.moves else self.grads, rows))
        self.updated(d, new, rows)

    def keep(self, i: int, after: Any, rows: list[int] | None) -> None:
        """Keep what a whole transform has returned as its state."""
        info, fields = self.plan.fields[i], self.states[i]
        d = self.plan.links[i].transform.declaration
        if d.state is not None:
            if self.inputs.widened or d.state_dtype is not None:
                after = [like(x, pick(c, rows)) if leaf else x for x, c, leaf in zip(after, fields, info.leaves)]
            self.states[i] = [list(x) if leaf else x for x, leaf in zip(after, info.leaves)]
            if rows is not None:
                self.states[i] = [put(c, rows, x) if leaf else x for c, x, leaf in zip(fields, after, info.leaves)]
        elif info.step >= 0:
            self.states[i] = [fields[info.step] + 1]

    def updated(self, d: Any, new: Any, rows: list[int] | None) -> None:
        """Keep what a whole transform has returned as its updates."""
        if d.scales:
            if rows is None and self.env.mode == "program":
                self.factor = new.item() if isinstance(new, Tensor) and new.is_cpu else new
                return
            new = maths.multiply(pick(self.grads, rows), torch.as_tensor(new))
        if d.moves and not self.moved:
            new = [x - p for x, p in zip(new, pick(self.params, rows))]
        self.grads = list(new) if rows is None else put(self.grads, rows, new)

    def nested(
        self, inner: Inner, lists: tuple[list[Any], list[Any], list[Any]], apply: bool, donate: bool
    ) -> tuple[list[Any], list[Any]]:
        """Run a chain inside this one."""
        env, rows = self.env, inner._rows
        own = Ownership(given=donate and env.own.given, counters=env.own.counters and rows is None)
        mask: Mask = lambda masks: pick(self.inputs.mask(masks), rows)  # noqa: E731
        inputs = Inputs(*lists, mask, {name: extra(self.inputs, self.plan, name, rows) for name in self.inputs.extras})
        inputs.plain, inputs.layout, inputs.rehearsed = self.inputs.plain, self.inputs.layout, True
        outer = pick(self.params, rows)
        if any([p.dtype != q.dtype for p, q in zip(inputs.params, outer)]):
            inputs.widened = True
            inputs.extras = {n: at_dtypes(x, outer) if n == "value_and_grad" else x for n, x in inputs.extras.items()}
        inputs.widened |= self.inputs.widened
        within = Env(env.mode, env.wanted, own, [*inputs.grads, *inputs.params])
        result = run_chain(inner._groups, inputs, within, apply)
        if within.mode != env.mode:
            env.record()
        return result

    # -- leafwise transforms

    def leafwise(self, n: int, apply: bool) -> None:
        """The `n`-th stage, a run of consecutive leafwise transforms, with `params + updates` at its end if `apply`."""
        groups, stage = self.groups, self.plan.stages[n]
        if self.env.wanted == "fused" and apply:
            for plan, _ in groups:
                demand_kernel(plan.fused_chain(plan.stages[n].positions), self.params)
        if stage.scheduled and self.env.watched:
            for plan, rows in groups:  # the schedules must be known before anything is overwritten
                for i in plan.stages[n].scheduled:
                    on, column = self.inputs.selected(plan.links[i]), self.states[i][plan.fields[i].step]
                    self.numbers.evaluate(plan.links[i].transform, [column[k] for k in rows if on is None or on[k]])
        odd = None if self.inputs.plain else unusual([self.grads, self.params, *[self.states[i][f] for i, f in stage.columns]])
        elsewhere = isinstance(self.factor, Tensor) and not alike([p.device for p in self.params])
        if self.env.mode == "leaf" or elsewhere or odd is not None:
            self.scale()
        scaled = self.factor is not None
        sorting = Sorting(self, stage, odd, apply)
        chain = groups[0].plan.fused_chain(stage.positions, scaled) if len(groups) == 1 and sorting.uniform() else None
        if chain is not None and not sorting.splits(chain):
            self.grads = self.bucket(chain, None, apply)
        else:
            out = list(self.grads)
            for group in groups:
                for ks, positions in sorting.buckets(group, group.plan.stages[n]):
                    chain, strange = group.plan.fused_chain(positions, scaled), odd is not None and odd[ks[0]]
                    for k, u in zip(ks, self.bucket(chain, ks, apply, strange)):
                        out[k] = u
            self.grads = out
        self.factor = None

    def bucket(self, chain: FusedChain, rows: list[int] | None, apply: bool, odd: bool = False) -> list[Any]:
        """Run these transforms on these rows, keep their states, and return the updates, or the parameters if `apply`."""
        grads, params = pick(self.grads, rows), pick(self.params, rows)
        fields: list[list[Any]] = []
        for i, _, _ in chain.items:
            fields.append(self.states[i] if rows is None else [pick(c, rows) for c in self.states[i]])
        if (rows is not None or self.inputs.facts is None) and self.begun(chain, rows, fields, params):
            return self.parts(chain, ([*range(len(self.params))] if rows is None else rows, fields), apply, odd)
        task = Task(chain, (grads, params, fields), apply, self.env, self.numbers)
        task.factor, task.odd = self.factor, odd
        task.facts = self.inputs.facts if rows is None else None
        updates, news = execute(task) if odd else run_plain(task)
        for (i, _, info), new in zip(chain.items, news):
            for f, (x, scalar) in enumerate(zip(new, info.scalars)):
                if x is None:
                    continue  # a field that these parameters do not have
                if scalar and self.env.mode != "leaf":
                    self.writes.append(CounterWrite(i, f, rows, x))
                    continue
                self.states[i][f] = x if rows is None else put(self.states[i][f], rows, x)
        return updates

    def begun(self, chain: FusedChain, rows: list[int] | None, fields: list[list[Any]], params: list[Any]) -> bool:
        """Make the states that these parameters do not have: a transform was off, or they were masked, when `init` ran.

        Returns:
            whether some of them lack other fields than the others, as large ones may lack those that small ones have.
        """
        for (i, value, _), own in zip(chain.items, fields):
            if own and own[0][0] is None and all([c[0] is None for c in own]):
                own[:] = [list(c) for c in zip(*[fresh_state(value, p) for p in params])]
                for f, column in enumerate(own):
                    self.states[i][f] = column if rows is None else put(self.states[i][f], rows, column)
                if not all([alike([x is None for x in column]) for column in own]):
                    return True
        return False

    def parts(self, chain: FusedChain, given: tuple[list[int], list[list[Any]]], apply: bool, odd: bool) -> list[Any]:
        """`bucket`, of rows whose states, which are given too, lack different fields."""
        rows, fields = given
        found: dict[tuple[bool, ...], list[int]] = {}
        for k in range(len(rows)):
            found.setdefault(tuple([c[k] is None for own in fields for c in own]), []).append(k)
        out: list[Any] = [None] * len(rows)
        for ks in found.values():
            for k, u in zip(ks, self.bucket(chain, [rows[k] for k in ks], apply, odd)):
                out[k] = u
        return out


class Sorting:
    """The parameters of a leafwise stage, sorted into buckets."""

    def __init__(self, run: Run, stage: Stage, odd: list[bool] | None, apply: bool) -> None:
        self.run, self.stage, self.odd, self.apply = run, stage, odd, apply
        self.mode: Mode = run.env.mode

    def uniform(self) -> bool:
        """Whether all parameters can be taken together."""
        stage, states, facts = self.stage, self.run.states, self.run.inputs.facts
        if stage.masked or self.odd is not None:
            return False
        for i, f in stage.scalars:
            if states[i][f][0] is None or (self.mode != "leaf" and not one(states[i][f], self.mode)):
                return False
        if facts is None:
            return self.alike()
        if ("uniform", stage.start) not in facts:
            facts["uniform", stage.start] = self.alike()
        return bool(facts["uniform", stage.start])

    def alike(self) -> bool:
        """Whether all parameters have one dtype and device, and a state."""
        stage, params, states = self.stage, self.run.params, self.run.states
        for i, f in stage.columns:
            if not all([x is not None for x in states[i][f]]):
                return False
        return alike([p.dtype for p in params]) and (all([p.is_cpu for p in params]) or alike([p.device for p in params]))

    def splits(self, chain: FusedChain) -> bool:
        """Whether there are small tensors that are better packed, and large ones that are not."""
        env, params = self.run.env, self.run.params
        if env.wanted != "compiled" or self.mode != "program":
            return False
        if self.apply and chain.kernel is not None and env.own.given and not chain.first:
            return False  # a kernel of torch's takes them all
        few = sum([p.numel() <= SIZE for p in params])
        return COUNT <= few < len(params)

    def buckets(self, group: ParamSlice, stage: Stage) -> list[tuple[list[int], tuple[int, ...]]]:
        """The rows that one program can take together, and the transforms that act on them."""
        plan, rows = group.plan, group.rows
        selected, states = self.run.inputs.selected, self.run.states
        params = [self.run.params[k] for k in rows]
        masks = [None if m is None else [m[k] for k in rows] for m in [selected(plan.links[i]) for i in stage.positions]]
        keys: list[Sequence[Any]] = [[(p.dtype, p.device) for p in params], *[m for m in masks if m is not None]]
        if self.odd is not None:
            keys.append([self.odd[k] and (2 if sharded.is_sharded(self.run.params[k]) else 1) for k in rows])
        if self.splits(plan.fused_chain(stage.positions)):
            keys.append([p.numel() <= SIZE for p in params])
        for i, f in (*stage.columns, *stage.scalars):
            values = [states[i][f][k] for k in rows]
            keys.append([x is None for x in values])
            if (i, f) in stage.scalars and self.mode != "leaf":
                readable = self.mode == "program" and all([x is None or x.is_cpu for x in values])
                number = self.run.numbers.number
                keys.append([x if x is None else number(x) for x in values] if readable else first_places(values))
        found: dict[tuple[Any, ...], list[int]] = {}
        for k, key in enumerate(zip(*keys)):
            found.setdefault(key, []).append(k)
        return [
            ([rows[k] for k in ks], tuple([i for i, m in zip(stage.positions, masks) if m is None or m[ks[0]]]))
            for ks in found.values()
        ]


def unstopped(fields: list[Any], info: Fields) -> list[Any]:
    """The state of a whole transform, which adds to its counters by itself: one that has come to `STOP` is a float64."""
    places = info.counts or ((info.step,) if info.step >= 0 else ())
    for f in places:
        x = fields[f]
        if isinstance(x, Tensor) and x.dtype is torch.float32 and read(x) >= STOP:
            fields = put(fields, [f], [x.to(torch.float64)])
    return fields


def unusual(lists: list[list[Any]]) -> list[bool] | None:
    """Which parameters have tensors in these lists that are not plain; None if they all are."""
    if plain(*lists, optional=True):
        return None
    return [not plain(row, optional=True) for row in zip(*lists)]


def extra(inputs: Inputs, plan: Plan, name: str, rows: list[int] | None) -> Any:
    """An extra argument, for some of the parameters: a function of all is one of these, the others held fixed."""
    given = inputs.extras[name]
    if name in plan.trees:
        return pick(given, rows)
    if name == "value":
        return sharded.whole(given)
    if rows is None or name != "value_and_grad":
        return given

    def some(params: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        value, grads = given(put(inputs.params, rows, params))
        return value, pick(grads, rows)

    return some


def at_dtypes(function: Any, params: list[Tensor]) -> Any:
    """A loss with its gradients, for a transform that sees parameters in other dtypes: those of the model are these ones'."""

    def rounded(wide: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        value, grads = function(like(wide, params))
        return value, like(grads, wide)

    return rounded


def like(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """A new field in the dtypes of the old one."""
    pairs = list(zip(new, old))
    return [x.to(y.dtype) if isinstance(x, Tensor) and isinstance(y, Tensor) else x for x, y in pairs]


def demand_kernel(chain: FusedChain, params: list[Tensor]) -> None:
    """Refuse to do without a kernel, unless it is only the memory layout, or the type, of a tensor that is in the way."""
    odd = [p for p in params if p.dtype not in FUSED_DTYPES]
    if chain.kernel is None or odd:
        p = odd[0] if odd else params[0]
        raise RuntimeError(
            "A fused step (fused=True, executor='fused') needs a chain that ends in what a torch._fused_* kernel computes, on "
            f"floating-point tensors, with plain numbers as hyperparameters, but got {chain.names or 'an empty chain'} on "
            f"{p.dtype} ({p.device}). Leave both out, and the fastest way that fits is chosen."
        )


def one(values: list[Any], mode: Mode) -> bool:
    """Whether all are one and the same object."""
    if mode == "traced":
        return all([x is values[0] for x in values])
    return len(set(map(id, values))) == 1
