"""Lists in, lists out: the links of a transform, run on all parameters at once.

This is where a call decides how its leaf functions are run. The mode is chosen once, by `choose`:

* ``leaf``: the leaf function itself, one parameter at a time, on bare tensors. Inside `torch.func`, under forward-mode
  differentiation, or when anything requires grad.
* ``program``: all parameters at once on `torch._foreach_*` (see `purestep.program`), or a kernel of `KERNELS` when the end
  of a chain spells one.
* ``traced``: the same program while `torch.compile`, `make_fx` or `torch.export` looks on; numbers stay tensors.

Parameters are sorted into *buckets*, which differ in what a program cannot take as an input: dtype, device, masks, the
number of updates so far. Almost always there is one bucket, and finding that out is all it costs.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain as flat
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from purestep import maths
from purestep.program import Part, Recipe, call, program
from purestep.tree import Spec, flatten_like, quote
from purestep.value import Declaration, Schedule, Value

Executor: TypeAlias = Literal["leaf", "foreach", "fused"]
Mode: TypeAlias = Literal["leaf", "program", "traced"]


class EmptyState(NamedTuple):
    """The state of a transform that needs none."""


class ScheduleState(NamedTuple):
    """The state of a transform that needs none but for a schedule among its hyperparameters."""

    step: maths.Scalar  # updates so far


class Fields(NamedTuple):
    """What the fields of a state are."""

    names: tuple[str, ...] = ()
    scalars: tuple[bool, ...] = ()  # one number per parameter
    like: tuple[bool, ...] = ()  # the parameter's shape and dtype
    leaves: tuple[bool, ...] = ()  # one entry per parameter
    step: int = -1  # the position of `step`


class LinkDeclaration(Declaration):
    """A declared transform: its function, the type of its state, and what switches it off."""

    def __init__(self, function: Callable[..., Any], state: type | None, off: str | None, whole: bool) -> None:
        super().__init__(function, given=3 if state is not None or whole else 2)
        self.state, self.off, self.whole = state, off, whole
        self.fields = Fields() if state is None else inspect_state(state, whole)
        self.init_names: tuple[str, ...] = ()
        if state is not None and not whole:
            self.init_names = tuple(inspect.signature(state.init).parameters)[1:]  # type: ignore[attr-defined]


def inspect_state(state: type, whole: bool) -> Fields:
    """Read the fields of a state off its annotations."""
    hints = typing.get_type_hints(state, include_extras=True)
    names: tuple[str, ...] = state._fields  # type: ignore[attr-defined]
    scalars = tuple(hints[n] == maths.Scalar for n in names)
    leaves = tuple(typing.get_origin(hints[n]) is list for n in names) if whole else (True,) * len(names)
    like = tuple(hints[n] is Tensor for n in names)
    return Fields(names, scalars, like, leaves, names.index("step") if "step" in names else -1)


class Primitive(Value):
    """A transform that is not made of others."""

    __slots__ = ()
    declaration: LinkDeclaration

    def __init__(self, declaration: LinkDeclaration, arguments: Mapping[str, Any]) -> None:
        super().__init__(declaration, arguments)
        state = declaration.state
        if state is not None and declaration.fields.step < 0 and scheduled(self):
            raise TypeError(
                f"{declaration.name} cannot follow a schedule, because {state.__name__} does not count its updates; "
                "add the field 'step: Scalar' to it, begun with counter(p)."
            )


class Link(NamedTuple):
    """One transform of a chain, and the masks it stands under."""

    transform: Primitive
    masks: tuple[Any, ...] = ()


class Group(NamedTuple):
    """Some of the parameters, and the links with the hyperparameters that hold for them."""

    links: tuple[Link, ...]
    rows: range


class Kernel(NamedTuple):
    """A fused kernel: what it can do, as the transforms it replaces, and how to call it."""

    pattern: tuple[tuple[LinkDeclaration, bool], ...]  # each with whether it may be left out
    run: Callable[..., None]


KERNELS: list[Kernel] = []
"""Filled by `purestep.fused`; the first whose pattern is the tail of a chain is used."""

CHUNK = 2**18
"""On a CPU a program works on this many elements at a time: its temporaries stay small, and in the cache."""


# ----------------------------------------------------------------------------------------------------------------- states


def state_type(value: Primitive) -> type:
    """The type of a transform's state."""
    if value.declaration.state is not None:
        return value.declaration.state
    return ScheduleState if scheduled(value) else EmptyState


def fields_of(value: Primitive) -> Fields:
    """What the fields of a transform's state are."""
    if value.declaration.state is not None:
        return value.declaration.fields
    return SCHEDULED if scheduled(value) else EMPTY


EMPTY = Fields()
SCHEDULED = Fields(("step",), (True,), (False,), (True,), 0)


def scheduled(value: Primitive) -> bool:
    """Whether any hyperparameter is a schedule."""
    a = value.arguments
    for name in value.declaration.hypers:
        x = a[name]
        if isinstance(x, Schedule) or (isinstance(x, tuple) and any([isinstance(y, Schedule) for y in x])):
            return True
    return False


def is_off(value: Primitive) -> bool:
    """Whether a transform does nothing: its strength is the plain number 0. A tensor may be 0, but is never off."""
    off = value.declaration.off
    if off is None:
        return False
    strength = value.arguments[off]
    return isinstance(strength, float) and strength == 0.0


def fresh_state(value: Primitive, p: Tensor) -> tuple[Any, ...]:
    """The state of one parameter before its first update."""
    d = value.declaration
    if d.state is None:
        return ScheduleState(maths.counter(p)) if scheduled(value) else EmptyState()
    state: tuple[Any, ...] = d.state.init(p, **{name: value.arguments[name] for name in d.init_names})
    return state


# -------------------------------------------------------------------------------------------------------------- one call


class Call:
    """One update of all parameters.

    `params` and `grads` are lists; `states` holds, per link, a list of fields, each a list over the parameters (for a
    whole transform: its state, with lists for what it keeps per parameter). Every parameter has a gradient: the others
    never get here. `mask` evaluates a mask on these parameters.
    """

    def __init__(
        self,
        grads: list[Any],
        params: list[Any],
        states: list[Any],
        mask: Callable[[Any], list[bool]],
        mode: Mode,
        *,
        apply: bool,
        donate: bool,
        alone: bool,
        executor: Executor | None,
    ) -> None:
        self.alone = alone  # whether no one else holds these counters: a parameter that stands still may share them
        self.mask, self.mode, self.apply, self.donate, self.executor = mask, mode, apply, donate, executor
        self.grads, self.params, self.states = grads, params, states
        self.own = False  # whether the gradients' memory is ours: true once a link has made new ones
        self.read: dict[int, Any] = {}  # counters as numbers, by identity
        self.writes: list[tuple[int, int, Sequence[int] | None, Any]] = []  # link, field, rows, new value

    def run(self, groups: Sequence[Group]) -> tuple[list[Any], list[Any]]:
        """The new parameters (or the updates), and the new states."""
        links = groups[0].links
        done = False
        for start, stop, whole in stages(links):
            if whole:
                self.whole(start, links[start])
            else:
                done = self.apply and stop == len(links)
                self.leafwise(groups, start, stop, done)
        if self.apply and not done:
            self.leafwise(groups, len(links), len(links), True)
        self.settle()
        return self.grads, self.states

    # -- whole transforms

    def whole(self, i: int, link: Link) -> None:
        value = link.transform
        rows = self.selected([link], range(len(self.params)))
        keep = None if rows[0] is None else [k for k, on in enumerate(rows[0]) if on]
        grads, params = pick(self.grads, keep), pick(self.params, keep)
        hypers = {name: x if isinstance(x, float) else self.lower_all(x, None) for name, x in value.arguments.items()}
        new, self.states[i] = value.declaration.function(grads, self.states[i], params, **hypers)
        self.grads = new if keep is None else put(self.grads, keep, new)
        self.own = False

    # -- leafwise transforms

    def leafwise(self, groups: Sequence[Group], start: int, stop: int, apply: bool) -> None:
        """A run of consecutive leafwise links, with `params + updates` at its end if `apply`."""
        if not self.params:
            return
        out: list[Any] | None = None
        for group in groups:
            links = group.links[start:stop]
            for rows, chosen in self.buckets(links, start, group.rows):
                updates = self.bucket([(start + k, links[k].transform) for k in chosen], rows, apply)
                if rows is None:
                    out = updates
                else:
                    out = list(self.grads) if out is None else out
                    for k, u in zip(rows, updates):
                        out[k] = u
        self.grads = out if out is not None else self.grads
        self.own = True

    def buckets(self, links: Sequence[Link], start: int, rows: range) -> Iterator[tuple[list[int] | None, list[int]]]:
        """The rows (None for all) that one program can take together, and which of the links it runs."""
        every = len(rows) == len(self.params)
        params = self.params if every else self.params[rows.start : rows.stop]
        keys: list[Iterable[Any]] = []
        if len({p.dtype for p in params}) > 1 or len({p.device for p in params}) > 1:
            keys.append([(p.dtype, p.device) for p in params])
        masks = self.selected(links, rows)
        keys += [m for m in masks if isinstance(m, list)]
        for i, link in enumerate(links, start):
            fields = self.states[i]
            if not fields or is_off(link.transform):
                continue
            scalars = fields_of(link.transform).scalars
            for f, values in enumerate(fields):
                values = values if every else values[rows.start : rows.stop]
                if type(None) in set(map(type, values)):
                    keys.append([x is None for x in values])
                elif scalars[f] and self.mode != "leaf" and not uniform(values, self.mode):
                    keys.append([self.number(x) if x.is_cpu else id(x) for x in values])
        everything = [k for k, m in enumerate(masks) if m is not False]
        if not keys:
            yield None if every else list(rows), everything
            return
        sorted_rows: dict[tuple[Any, ...], list[int]] = {}
        for k, key in zip(rows, zip(*keys)):
            sorted_rows.setdefault(key, []).append(k)
        if every and len(sorted_rows) == 1:
            yield None, [k for k in everything if masks[k] is None or masks[k][0]]
            return
        for found in sorted_rows.values():
            first = found[0] - rows.start
            yield found, [k for k in everything if masks[k] is None or masks[k][first]]

    def selected(self, links: Sequence[Link], rows: range) -> list[Any]:
        """Per link: None if it acts on every row, False if on none (it is off), else a list of bools."""
        result: list[Any] = []
        for link in links:
            if is_off(link.transform):
                result.append(False)
            elif not link.masks:
                result.append(None)
            else:
                columns = [self.mask(m) for m in link.masks]
                result.append([all(c[k] for c in columns) for k in rows])
        return result

    # -- one bucket

    def bucket(self, links: list[tuple[int, Primitive]], rows: list[int] | None, apply: bool) -> list[Any]:
        """Run these links on these rows, write their states, and return the updates, or the parameters if `apply`."""
        grads, params = pick(self.grads, rows), pick(self.params, rows)
        fields = [[pick(f, rows) for f in self.states[i]] for i, _ in links]
        for (i, value), columns in zip(links, fields):
            if columns and all([c[0] is None for c in columns]):  # not in the state yet: it was off, or the parameter masked
                made = [fresh_state(value, p) for p in params]
                columns[:] = [list(c) for c in zip(*made)]
                for old, column in zip(self.states[i], columns):
                    for k, x in zip(range(len(params)) if rows is None else rows, column):
                        old[k] = x
        complex_ = params[0].is_complex()
        if complex_:
            grads, params = map(real, (grads, params))
            fields = [[c if s else real(c) for c, s in zip(cs, fields_of(v).scalars)] for (_, v), cs in zip(links, fields)]
        run = self.leaf if self.mode == "leaf" else self.program
        updates, news = run(links, grads, params, fields, apply)
        if complex_:
            updates = imaginary(updates)
            news = [[x if s else imaginary(x) for x, s in zip(xs, fields_of(v).scalars)] for (_, v), xs in zip(links, news)]
        for (i, value), new in zip(links, news):
            for f, (x, scalar) in enumerate(zip(new, fields_of(value).scalars)):
                if scalar and self.mode != "leaf":
                    self.writes.append((i, f, rows, x))
                elif rows is None:
                    self.states[i][f] = x
                else:
                    column = self.states[i][f]
                    for k, y in zip(rows, x):
                        column[k] = y
        return updates

    # -- mode: leaf

    def leaf(self, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """The leaf functions themselves, one parameter after the other."""
        out, news = [], [[[] for _ in columns] for columns in fields]
        for k, (g, p) in enumerate(zip(grads, params)):
            u = g
            for (_, value), columns, new in zip(links, fields, news):
                u, state = leaf_update(value, u, [c[k] for c in columns], p)
                for column, x in zip(new, state):
                    column.append(x)
            if apply:
                u = p + u
            elif any([u is c[-1] for new in news for c in new]):
                u = u.clone()  # the updates are handed out; the state's memory may be given away at the next step
            out.append(u if u.dtype == p.dtype else u.to(p.dtype))
        return out, news

    # -- mode: program

    def program(self, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """All parameters at once: the tail of the chain as a fused kernel if there is one, the rest as a program."""
        if apply and self.executor != "foreach" and self.mode == "program":
            for kernel in KERNELS:
                k = tail(kernel, [v.declaration for _, v in links])
                if k is not None and self.fits(links[k:], grads, params, fields[k:]):
                    before: list[Any] = []
                    if k:
                        grads, before = self.foreach(links[:k], grads, params, fields[:k], False)
                    params, after = self.fused(kernel, links[k:], grads, params, fields[k:])
                    return params, before + after
        if self.executor == "fused":
            names = " -> ".join(v.declaration.name for _, v in links)
            raise RuntimeError(
                f"fused=True needs a chain that ends in what a torch._fused_* kernel computes, on contiguous floating-point "
                f"tensors of one dtype, with plain numbers as hyperparameters; {names} on {params[0].dtype} "
                f"({params[0].device}) is not that. Leave fused out, and the fastest way that fits is chosen."
            )
        return self.foreach(links, grads, params, fields, apply)

    def foreach(self, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        parts, numbers, uniform_dtype = [], [], True
        columns: list[Any] = []
        places: list[tuple[int, int]] = []
        news: list[list[Any]] = [[None] * len(c) for c in fields]
        for j, ((_, value), own) in enumerate(zip(links, fields)):
            d = value.declaration
            count = own[fields_of(value).step][0] if own and fields_of(value).step >= 0 else None
            if d.state is None:
                if own:
                    news[j] = [self.number(count) + 1]
                absent: tuple[bool, ...] = ()
            else:
                absent = tuple([c[0] is None for c in own])
                for f, c in enumerate(own):
                    if not absent[f]:
                        scalar = d.fields.scalars[f]
                        columns.append(self.number(c[0]) if scalar else c)
                        places.append((j, f))
                        uniform_dtype = uniform_dtype and (scalar or c[0].dtype == params[0].dtype)
            lowered = [self.lower_all(value.arguments[name], count) for name in d.hypers]
            numbers += flat.from_iterable(x if isinstance(x, tuple) else () if x is None else (x,) for x in lowered)
            parts.append(part(value, absent))
        if not uniform_dtype:
            return self.leaf_lowered(links, grads, params, fields, apply)
        recipe = Recipe(tuple(parts), apply, self.own, self.donate)
        run = program(recipe).run
        pieces: list[tuple[Any, ...]] = []
        for cut in chunks(params) if self.mode == "program" else [None]:
            if cut is None:
                pieces.append(run(grads, params, *columns, *numbers))
            else:
                given = [c[cut] if isinstance(c, list) else c for c in columns]
                pieces.append(run(grads[cut], params[cut], *given, *numbers))
        updates: Any = pieces[0][0] if len(pieces) == 1 else list(flat.from_iterable(x[0] for x in pieces))
        for n, (j, f) in enumerate(places, 1):
            scalar = fields_of(links[j][1]).scalars[f]
            news[j][f] = pieces[0][n] if scalar or len(pieces) == 1 else list(flat.from_iterable(x[n] for x in pieces))
        return list(updates), news

    def leaf_lowered(self, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any, apply: bool) -> tuple[Any, Any]:
        """State and parameters of different dtypes: promoted by torch's rules, leaf by leaf, and stored as they were."""
        updates, news = self.leaf(links, grads, params, fields, apply)
        if apply and self.donate:
            updates = overwrite(params, updates)
        for (_, value), old, new in zip(links, fields, news):
            for f, scalar in enumerate(fields_of(value).scalars):
                if scalar:
                    new[f] = new[f][0]
                elif self.donate:
                    new[f] = overwrite(old[f], new[f])
        return updates, news

    # -- fused kernels

    def fits(self, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any) -> bool:
        """Whether a kernel may be trusted with these tensors: it reads memory in order, whatever the strides say."""
        p = params[0]
        if p.device.type not in ("cpu", "cuda") or p.dtype not in FUSED_DTYPES:
            return False
        lists = [grads, params, *[c for (_, v), cs in zip(links, fields) for c, s in zip(cs, fields_of(v).scalars) if not s]]
        if not all([set(map(type, x)) <= PLAIN for x in lists]):
            return False
        if any([x[0].dtype != p.dtype for x in lists]):
            return False
        if not all([t.is_contiguous() for x in lists for t in x]):
            if not all([same_layout(ts) for ts in zip(*lists)]):
                return False
        for _, value in links:
            for name in value.declaration.hypers:
                x = value.arguments[name]
                for y in x if isinstance(x, tuple) else (x,):
                    if isinstance(y, Tensor) and not y.is_cpu and name != "lr":
                        return False
        return True

    def fused(self, kernel: Kernel, links: list[tuple[int, Primitive]], grads: Any, params: Any, fields: Any) -> tuple[Any, Any]:
        hypers: dict[str, Any] = {}
        state: dict[str, Any] = {}
        news: list[list[Any]] = []
        before: Any = 0
        for (_, value), own in zip(links, fields):
            d, info = value.declaration, fields_of(value)
            count = own[info.step][0] if own and info.step >= 0 else None
            hypers[d.name] = True
            hypers |= {n: self.lower_all(x, count) if n in d.intervals else x for n, x in value.arguments.items()}
            new = [c if self.donate else [t.clone() for t in c] for c in own]
            if count is not None:
                new[info.step] = self.number(count) + 1
                if d.state is not None:
                    before = self.number(count)
                    state["step"] = [stored(count, before + 1)] * len(params)
            state |= {n: c for n, c, s in zip(info.names, new, info.scalars) if not s}
            news.append(new)
        out = params if self.donate else [p.clone() for p in params]
        kernel.run(out, grads, state, hypers, before)
        return out, news

    # -- numbers

    def number(self, x: Tensor) -> Any:
        """A counter as a number: a float if it is on the CPU, else a tensor in the precision numbers are computed in."""
        if self.mode == "program":
            if x.is_cpu:
                found = self.read.get(id(x))
                if found is None:
                    found = self.read[id(x)] = x.item()
                return found
            return x
        return x.to(maths.precise(x.device))

    def lower_all(self, x: Any, count: Tensor | None) -> Any:
        """A hyperparameter as the program takes it; `count` is the counter that schedules are called with."""
        if isinstance(x, float):
            return x
        if isinstance(x, tuple):
            return tuple([self.lower_all(y, count) for y in x])
        if isinstance(x, Schedule):
            step = self.number(count) if count is not None else 0
            return self.lower_all(x(int(step) if isinstance(step, float) else step), count)
        if isinstance(x, Tensor):
            single(x)
            return x.item() if self.mode == "program" and x.is_cpu else x.reshape(()) if x.dim() else x
        return x

    # -- counters

    def settle(self) -> None:
        """Store the new counters, one tensor for all parameters that agree; in place where every reader has moved on."""
        if not self.writes:
            return
        if self.donate and self.alone and all([rows is None for _, _, rows, _ in self.writes]):
            first = [self.states[i][f][0] for i, f, _, _ in self.writes]
            if all([uniform(self.states[i][f], self.mode) for i, f, _, _ in self.writes]):
                for old, (_, _, _, x) in zip(first, self.writes):
                    old.copy_(x) if isinstance(x, Tensor) else old.fill_(x)
                return
        made: dict[Any, Tensor] = {}
        for i, f, rows, x in self.writes:
            column = self.states[i][f]
            old = column[0 if rows is None else rows[0]]
            key = (id(x) if isinstance(x, Tensor) else x, f, old.dtype, old.device)
            new = made.get(key)
            if new is None:
                new = made[key] = stored(old, x)
            if rows is None:
                self.states[i][f] = [new] * len(column)
            else:
                for k in rows:
                    column[k] = new


# --------------------------------------------------------------------------------------------------------------- helpers

FUSED_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def choose(executor: Executor | None, *tensors: Iterable[Any]) -> Mode:
    """How leaf functions are run in this call."""
    if executor == "leaf" or maths.transforming():
        return "leaf"
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return "traced"
    if torch.is_grad_enabled():
        for x in tensors:
            if any([t.requires_grad for t in x if isinstance(t, Tensor)]):
                return "leaf"
    return "program"


def leaf_update(value: Primitive, g: Tensor, columns: list[Any], p: Tensor) -> tuple[Tensor, list[Any]]:
    """One leafwise transform on one parameter: its function on bare tensors. State is stored in the dtype it came in."""
    d = value.declaration
    info = fields_of(value)
    count = lifted(columns[info.step]) if info.step >= 0 and columns else None
    hypers = {n: evaluated(x, count) if n in d.intervals else x for n, x in value.arguments.items()}
    if d.state is None:
        u, _ = call(d, g, None, p, hypers)
        return u, [stored(columns[0], count + 1)] if count is not None else []
    state = d.state(*[lifted(c) if scalar and c is not None else c for c, scalar in zip(columns, info.scalars)])
    u, new = call(d, g, state, p, hypers)
    return u, [x if c is None else stored(c, x) for c, x in zip(columns, new)]


def evaluated(x: Any, count: Tensor | None) -> Any:
    """A hyperparameter for a leaf function: schedules called, batches refused."""
    if isinstance(x, tuple):
        return tuple([evaluated(y, count) for y in x])
    if isinstance(x, Schedule):
        return evaluated(x(0 if count is None else count), count)
    if isinstance(x, Tensor):
        single(x)
        return x.reshape(()) if x.dim() else x
    return x


def single(x: Tensor) -> None:
    """Refuse a hyperparameter that holds several values."""
    if x.dim() and x.numel() != 1:
        raise ValueError(
            f"A hyperparameter must be one number, but got a tensor of shape {tuple(x.shape)}. To train one model per value, "
            "vmap over the optimizer: torch.func.vmap(train, in_dims=(purestep.in_dims(opt), ...))(opt, ...)."
        )


def lifted(x: Tensor) -> Tensor:
    """A counter in the precision that numbers are computed in."""
    return x.to(maths.precise(x.device))


def stored(old: Tensor, x: Any) -> Tensor:
    """The new value of a state field, in the dtype and on the device of the old."""
    if isinstance(x, Tensor):
        return x if x.dtype == old.dtype else x.to(old.dtype)
    return torch.full((), x, dtype=old.dtype, device=old.device)


def part(value: Primitive, absent: tuple[bool, ...]) -> Part:
    d, a = value.declaration, value.arguments
    tuples = tuple([len(x) if isinstance(x, tuple) else -1 if x is None else 0 for x in [a[n] for n in d.hypers]])
    return Part(d, d.state, d.fields.scalars, d.fields.like, absent, tuple([a[n] for n in d.switches]), tuples)


def stages(links: Sequence[Link]) -> list[tuple[int, int, bool]]:
    """Runs of consecutive leafwise links, and each whole link by itself: (start, stop, is whole)."""
    result: list[tuple[int, int, bool]] = []
    for i, link in enumerate(links):
        whole = link.transform.declaration.whole
        if not whole and result and not result[-1][2]:
            result[-1] = (result[-1][0], i + 1, False)
        else:
            result.append((i, i + 1, whole))
    return result


def tail(kernel: Kernel, declarations: Sequence[LinkDeclaration]) -> int | None:
    """Where the tail that a kernel computes begins in a chain, or None."""
    i = len(declarations)
    for declaration, optional in reversed(kernel.pattern):
        if i and declarations[i - 1] is declaration:
            i -= 1
        elif not optional:
            return None
    return i


def uniform(values: Sequence[Any], mode: Mode) -> bool:
    """Whether all are one and the same object."""
    if mode == "traced":
        return all([x is values[0] for x in values])
    return len(set(map(id, values))) <= 1


def pick(values: list[Any], rows: Sequence[int] | None) -> list[Any]:
    return values if rows is None else [values[k] for k in rows]


def put(values: list[Any], rows: Sequence[int], new: Iterable[Any]) -> list[Any]:
    result = list(values)
    for k, x in zip(rows, new):
        result[k] = x
    return result


def overwrite(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    torch._foreach_copy_(old, new)
    return old


def real(xs: list[Any]) -> list[Any]:
    """Complex tensors as their real and imaginary parts, in a last dimension of 2 and the same memory."""
    return [torch.view_as_real(x) if x is not None and x.is_complex() else x for x in xs]


def imaginary(xs: list[Any]) -> list[Any]:
    return [torch.view_as_complex(x) for x in xs]


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether the same element stands at the same place in the memory of all of them, with no gaps."""
    strides = tensors[0].stride()
    return all([t.stride() == strides for t in tensors]) and torch._prims_common.is_non_overlapping_and_dense(tensors[0])


def chunks(params: list[Tensor]) -> list[slice | None]:
    """Slices of the parameters of about `CHUNK` elements each; one None for all at once, as an accelerator wants it."""
    if not params[0].is_cpu:
        return [None]
    sizes = [p.numel() for p in params]
    if len(params) == 1 or sum(sizes) <= 2 * CHUNK:
        return [None]
    cuts, start, size = [], 0, 0
    for k, n in enumerate(sizes):
        if size and size + n > CHUNK:
            cuts.append(slice(start, k))
            start, size = k, 0
        size += n
    return [*cuts, slice(start, len(params))]


def evaluate_mask(mask: Any, params: list[Any], spec: Spec) -> list[bool]:
    """A mask, a function of path and parameter or a pytree of bools, as one bool per parameter.

    Raises:
        TypeError: if it answers with anything but a bool, with the path it did so for.
    """
    if isinstance(mask, bool):
        return [mask] * len(params)
    paths = spec.paths()
    values = [mask(path, p) for path, p in zip(paths, params)] if callable(mask) else flatten_like(mask, spec, "mask")
    for path, x in zip(paths, values):
        if not isinstance(x, bool):
            raise TypeError(
                f"A mask must be True or False for every parameter, but for {quote(path)} it is {x!r} "
                f"({type(x).__name__}). Give (path, param) -> bool, or a pytree of bools shaped like params."
            )
    return values


def hyper_tensors(links: Iterable[Link]) -> list[Tensor]:
    """The hyperparameters that are tensors, those of schedules included."""
    return [x for link in links for x in pytree.tree_leaves(link.transform) if isinstance(x, Tensor)]
