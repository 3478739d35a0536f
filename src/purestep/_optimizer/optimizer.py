"""The stateful face: a real `torch.optim.Optimizer` around any transform.

`param_groups` and `state[p]` are kept exactly as torch keeps them and are the only truth: a step gathers lists from them,
hands them to the engine, and gives their memory away. A transform's state is spread over the parameters' state dicts under
its field names, so that checkpoints are torch's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import numbers
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain as chained
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core import maths, sharded
from purestep._core.hyper import several
from purestep._core.lists import alike, clones, overwrite
from purestep._core.masks import Label, Memo, Not, refuse_unmatched, refuse_unnamed, refuse_unused, route, select
from purestep._core.maths import readable, where
from purestep._core.plain import plain
from purestep._core.primitives import Fields, Link, Primitive, fields_of, fresh_state, fresh_whole_state, is_off, state_type
from purestep._core.torch_api import (
    STEP_POST_HOOKS,
    STEP_PRE_HOOKS,
    check_fused_device_and_dtype,
    disable_dynamo,
    profiling,
    set_grad_mode,
    tree_leaves,
    tree_map_only,
    tree_structure,
)
from purestep._core.tree import Spec, quote
from purestep._core.values import same
from purestep._engine.counters import Counters, together, traced
from purestep._engine.engine import Call, Executor, Mode, choose
from purestep._engine.guards import Looks
from purestep._engine.plan import Group, Plan, packed_links
from purestep._engine.repeat import solo_of
from purestep._engine.sparse import Touched
from purestep._executors.packed import apart, joined, small
from purestep._optimizer.begun import Begun, kind, options_of, reads, reads_whole, renewed
from purestep._optimizer.following import Following, Schedules, follows, kept, number
from purestep._optimizer.shared import Place, Shared
from purestep.transform import FROM_CLOSURE, Transform, chain, check_value, flattened, refuse_flat, whole
from purestep.transforms.mask import masked
from purestep.transforms.scale import maximize as ascend

F = TypeVar("F", bound=Callable[..., None])


def untraced(function: F) -> F:
    """For a function that `torch.compile` is to call, not to trace."""
    made: Any = disable_dynamo(function)
    return made


Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

NOTHING: Mapping[str, Any] = MappingProxyType({})

FLAGS = ("foreach", "capturable", "differentiable", "fused", "compile")

KEPT = ("_recipe", "_options", "_first", "_flags", "_ready", "_routes", "_compile", "_lazy", "_lazy_paths", "_numbers")
"""What an optimizer is made of, but for parameters and state."""


class Route(NamedTuple):
    """What the parameters with one label are optimized with."""

    transform: Transform  # the part of the whole that acts on them
    first: dict[str, Any]  # its hyperparameters: the options of their groups
    names: dict[str, str]  # what these are called in the whole
    links: tuple[int, ...]  # where it stands in the whole: in this order the groups are made


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that runs any transform.

    Everything that works on torch's optimizers works on it: parameter groups, closures, hooks, state dicts, learning rate
    schedulers, gradient scalers. A group's options are the transform's hyperparameters, under the names that
    `transform.hyperparams` gives them. A transform that sees all parameters together sees those of all groups, and keeps what
    belongs to all of them in `shared`.

    An option that follows a schedule is shown as a number, that of the last step, and the schedule stays out of the state
    dict. A number that is written there replaces the schedule from then on (as `ReduceLROnPlateau` does), and a schedule that
    is written there is followed. A scheduler of `torch.optim.lr_scheduler`, which leaves ``initial_lr`` in the group,
    multiplies instead: the step takes the schedule times ``group["lr"] / group["initial_lr"]``, and the group shows the
    scheduler's number. So that there is something to multiply, a schedule that begins at 0 shows its second number before the
    first step.

    Parameters may be spread over processes as torch's `DTensor` spreads them: by `torch.distributed.fsdp.fully_shard`, by
    tensor parallelism, beside plain ones. The numbers are those of whole parameters, also of norms, and all processes take the
    same decisions, as long as a loss that a transform asks for is the same in all of them.

    `FullyShardedDataParallel` and `torch.distributed.optim.ZeroRedundancyOptimizer` give each process an optimizer for a part
    of the parameters that is all it knows of. Transforms that treat every element by itself (and under the second, every
    parameter) are right there; those that see all parameters together (`clip_by_global_norm`, `skip_if_nonfinite`, …) would
    take the part for the whole. With the first they are refused. The second leaves nothing by which it could be known: clip
    with `torch.nn.utils.clip_grad_norm_` before the step instead, and use `fully_shard` for the others.

    Args:
        params: an iterable of tensors, of `(name, tensor)` pairs, or of dicts, each a parameter group with options of its
            own. Names are the paths that masks are asked with; without names a path is the parameter's number.
        transform: what to run. A subclass that makes its own `step` gives a dict of options instead, as to
            `torch.optim.Optimizer`; it may also be called `defaults`.
        maximize: climb instead of descending.
        foreach: run all parameters at once (True) or one by one, with less memory (False). By default the fastest.
        capturable: keep the learning rates of the groups in tensors on the parameters' device, where a CUDA graph that has
            captured a step finds them; see `refresh`. All else is on the device anyway.
        differentiable: let autograd run through the step.
        fused: insist on a fused kernel (True), or do without (False). By default one is used where it fits.
        compile: make one kernel of every run of elementwise transforms, with Inductor, at the first step; see
            `Transform.update`. It is not part of a checkpoint.

    Raises:
        TypeError: `transform` is not one, or a parameter is not a tensor.
        ValueError: an option of a group is out of its range.

    >>> import torch, purestep as ps
    >>> from purestep import optim
    >>> model = torch.nn.Linear(2, 1)
    >>> opt = optim.Optimizer(model.named_parameters(), ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=3e-4)))
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> opt.step()
    >>> opt.param_groups[0]["lr"], sorted(opt.state[model.weight])
    (0.0003, ['exp_avg', 'exp_avg_sq', 'step'])
    """

    _constants: ClassVar[Mapping[str, Any]] = {}
    """What torch keeps in the groups, though it never changes."""
    _before: ClassVar[Mapping[str, Any]] = {}
    """Options that a checkpoint may be too old to have, with the values they had before they existed."""

    _uncounted: ClassVar[frozenset[str]] = frozenset()
    """Fields of a state that torch keeps without counting updates: where one was given, the next update is not the first."""

    _numbers: dict[Tensor, int] = {}  # noqa: RUF012  (replaced, never written to)
    """Of parameters without names in a partition: their places in the order in which they were given."""

    _compile = False
    _own_step = False  # whether the class makes its steps itself
    _evaluating = False
    _check_fused = False

    @untraced
    def __init__(
        self,
        params: Params,
        transform: Transform | dict[str, Any] | None = None,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool = False,
        defaults: dict[str, Any] | None = None,
    ) -> None:
        options = transform if isinstance(transform, dict) else defaults
        if options is not None and not isinstance(transform, Transform) and type(self) is not Optimizer:
            self._own_step = True
            self._begin(params, without_step(), {}, {}, dict(options))
            return
        if not isinstance(transform, Transform):
            raise TypeError(f"Optimizer takes a transform, such as purestep.adamw(lr=3e-4), but got {transform!r}.")
        flags: dict[str, Any] = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "compile": compile}
        flags |= {"differentiable": differentiable, "fused": fused}
        if maximize and "value_and_grad" in transform.plan.extras:
            raise ValueError(
                f"maximize=True turns gradients around, but {transform!r} evaluates the closure by itself. Give maximize=True "
                "to the transform, if it takes it, or return minus the loss from the closure."
            )
        self._begin(params, transform, {} if routed(transform) else transform.hyperparams, flags)

    def _begin(
        self,
        params: Params,
        recipe: Any,
        options: Mapping[str, Any],
        flags: dict[str, Any],
        defaults: Mapping[str, Any] = NOTHING,
    ) -> None:
        """`recipe` is the transform, or the factory that makes it from a group's options; `defaults` are a subclass's own."""
        if flags.get("fused") and flags.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if flags.get("fused") and flags.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        self._check_fused = bool(flags.get("fused"))
        if self._check_fused:
            self._step_supports_amp_scaling = True  # gradient scalers of torch's then leave unscaling and skipping to `step`
        self._compile = bool(flags.pop("compile", False))
        others = [name for name in ("foreach", "fused", "differentiable") if flags.get(name)]
        if self._compile and others:
            raise RuntimeError(f"`compile` and `{others[0]}` cannot be `True` together.")
        self._recipe, self._options, self._first, self._flags = recipe, tuple(options), dict(options), tuple(flags)
        self._made: list[tuple[list[Any] | None, Transform]] = []
        self._ready = False
        self._rates: dict[tuple[int, str], Tensor] = {}  # by group and name, what a captured step reads
        self._looks: dict[int, Looks] = {}  # of the tensors of the last step, per group
        self._counters = Counters()
        self._known: dict[Any, dict[Tensor, bool]] = {}  # which parameters masks select
        self._routes: dict[str, Route] = {}  # by label, where a transform routes parameters
        self._untouched: dict[Tensor, Begun] = {}  # parameters that have made no step, and how their state began
        self._begun_shared: dict[str, tuple[Tensor, int]] = {}  # what is shared as it began: its tensors and their versions
        self._aside: dict[Tensor, tuple[dict[str, Tensor], set[str]]] = {}  # see `_set_aside`
        # by declaration: whether a first state depends on the values of parameters, or which of its fields do
        self._reads: dict[Any, Any] = {}
        self._schedules = Schedules()  # that options of the groups follow
        self._place = self._new_place()
        self._rehearsed: dict[int, Transform] = {}  # by group, the transform whose functions have been called before a step
        self._recipes: set[Any] = set()  # of these transforms
        # parameters without a shape yet, so without a label, with the numbers of the groups that their own was split into
        self._lazy: dict[Tensor, range] = {}
        self._lazy_paths: dict[Tensor, str] = {}  # of all parameters, in order, while there are such
        masks = [m for link in recipe.links for m in link.masks] if isinstance(recipe, Transform) else []
        if masks and not isinstance(params, Tensor):
            given: Any = list(params)
            groups = [g for g in given if isinstance(g, dict)] if is_groups(given) else [{"params": given}]
            for g in groups:
                if isinstance(g.get("params"), Iterator):
                    g["params"] = list(g["params"])
            if not any([name is not None for g in groups for name, _ in entries_of(g.get("params", ()))]):
                refuse_unnamed(masks)
            params = given
        if isinstance(recipe, Transform) and routed(recipe):
            params = self._split(list(params))
        else:
            self._first = {name: kept(x) for name, x in options.items()}
            self._check({**self._first, **flags})
        super().__init__(params, {**self._first, **flags, **self._constants, **defaults})
        self._ready = True
        for group in self.param_groups:
            self._schedules.take(group, self._names(group))
        self._set_defaults()
        refuse_unmatched(masks, list(self._paths().values()))
        self._refuse(self.param_groups)
        self._begin_state(self.param_groups)

    def _new_place(self) -> Place:
        """Where in the state the fields are that are kept for all parameters together."""
        return Place()

    # -- groups

    def _transform(self, group: Mapping[str, Any], strict: bool = False) -> Transform:
        """The transform with a group's options: the first one with what is different, or another where it has no such part.

        Only `strict` asks that numbers are within their ranges; a scheduler may leave them by a rounding error.
        """
        group = self._schedules.options(group)
        if self._routes:
            transform = self._routed(group, strict)
            return chain(ascend(), transform) if group["maximize"] else transform
        options = {name: group[name] for name in self._options}
        changes = {name: x for name, x in options.items() if not unchanged(self._first[name], x)}
        transform = self._base
        if isinstance(self._recipe, Transform) or changes.keys() <= transform.hyperparams.keys() | transform.switches.keys():
            transform = transform._replace(changes, strict)
        else:  # made of other parts: with these switches, and numbers that are known to be good, which are then replaced
            switches = {n: x for n, x in changes.items() if n not in transform.hyperparams}
            try:
                transform = self._recipe(**options)
            except ValueError as error:  # where a scheduler has left the range
                try:
                    transform = self._recipe(**{**self._first, **switches})
                except ValueError:
                    raise error from None
            transform = transform._replace({n: x for n, x in options.items() if n in transform.hyperparams}, strict)
        climbs = isinstance(self._recipe, Transform) and "maximize" in self._flags and group["maximize"]
        return chain(ascend(), transform) if climbs else transform

    @functools.cached_property
    def _base(self) -> Transform:
        """The transform with the options that the optimizer was made with."""
        return self._recipe if isinstance(self._recipe, Transform) else self._recipe(**self._first)

    def _check(self, group: Mapping[str, Any]) -> None:
        """Refuse options that are out of their range; a tensor must be one number, and is read once, here."""

        def number(name: str, x: Any) -> Any:
            if several(x):
                return tuple([number(f"{name}[{i}]", y) for i, y in enumerate(x)])
            if isinstance(x, Tensor) and x.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, but got one of shape {tuple(x.shape)}.")
            return x.item() if isinstance(x, Tensor) else x

        read = {name: number(name, group[name]) for name in self._names(group)}
        self._transform({**group, **read}, strict=True)

    def _names(self, group: Mapping[str, Any]) -> Iterable[str]:
        """The names of a group's options."""
        return self._routes[group["label"]].first if self._routes else self._options

    def _transforms(self) -> list[Transform]:
        """Each group's transform; made anew only where an option has changed."""
        if torch.compiler.is_compiling():  # what was made before would be a guard, and a new number a new graph
            return [
                self._captured(i, g) if g.get("capturable") else self._transform(g) for i, g in enumerate(self.param_groups)
            ]
        made = self._made
        if len(made) != len(self.param_groups):
            made[:] = [(None, chain())] * len(self.param_groups)
        together = bool(self._routes) and self._recipe.plan.whole
        for i, group in enumerate(self.param_groups):
            sources = self.param_groups if together else (group,)
            options = self._current(sources)
            old = made[i][0]
            if old is None or (not all(map(operator.is_, old, options)) and not all(map(unchanged, old, options))):
                if any(map(follows, options)) or self._schedules:
                    for g in sources:
                        self._schedules.take(g, self._names(g))
                    self._schedules.settle(sources)
                    options = self._current(sources)
                made[i] = (options, self._captured(i, group) if group.get("capturable") else self._transform(group))
        return [t for _, t in made]

    def _current(self, groups: Iterable[Mapping[str, Any]]) -> list[Any]:
        """The options of these groups as the transform takes them."""
        if self._schedules:
            groups = map(self._schedules.options, groups)
        return [tuple(x) if type(x := g[name]) is list else x for g in groups for name in self._names(g)]

    def _captured(self, i: int, group: Mapping[str, Any]) -> Transform:
        """A group's transform, with its learning rates in tensors that stay. No step that is captured writes to them."""
        transform = self._transform(group)
        if not group["params"] or not captures(group["params"][0]):
            return transform
        rates: dict[str, Any] = {}
        for name, x in transform.hyperparams.items():
            if name.split(".")[-1] == "lr" and isinstance(x, float):
                rate = self._rates.get((i, name))
                if rate is None:
                    device = group["params"][0].device
                    rate = self._rates[i, name] = torch.full((), x, dtype=torch.float32, device=device)
                elif not capturing():
                    rate.fill_(x)
                rates[name] = rate
        return transform._replace(rates, strict=False)

    def refresh(self) -> None:
        """Tell a CUDA graph that has captured a step what the learning rates of the groups are now.

        A graph runs again what the step did on the device, and nothing of what it did in Python. With ``capturable=True``
        it reads the learning rates from tensors, into which every step copies the groups', and so does this, before
        `replay`::

            with torch.cuda.graph(graph):
                optimizer.step()
            for batch in batches:
                ...
                scheduler.step()
                optimizer.refresh()
                graph.replay()
        """
        self._transforms()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own; see `torch.optim.Optimizer.add_param_group`.

        Where the transform is a partition it becomes one group for each label.
        """
        if not self._ready:
            super().add_param_group(param_group)
            return
        groups = self._split([param_group]) if self._routes and isinstance(param_group, dict) else [param_group]
        before = len(self.param_groups)
        try:
            self._set_defaults()  # with those of the labels that are new
            for group in groups:
                if isinstance(group, dict):
                    for name, x in {} if self._routes else self._first.items():
                        if follows(x):
                            group.setdefault(name, x)
                    self._check({**self.defaults, **group})
                super().add_param_group(group)
            self._refuse(self.param_groups[before:])
        except Exception:
            del self.param_groups[before:]
            raise
        for group in self.param_groups[before:]:
            self._schedules.take(group, self._names(group))
        self._begin_state(self.param_groups[before:])

    def _set_defaults(self) -> None:
        """What a group has where it says nothing: numbers, as torch's tools expect them.

        Of a partition these are the options that all its parts have: `OneCycleLR` asks here whether it may change momentum.
        """
        options = self._first
        if self._routes:
            first, *others = [route.first for route in self._routes.values()]
            options = {name: x for name, x in first.items() if all([name in other for other in others])}
            flags = {name: x for name, x in self.defaults.items() if name in self._flags or name in self._constants}
            self.defaults = {**options, **flags}
        self.defaults.update({name: Following(x).at(0) for name, x in options.items() if follows(x)})

    def _split(self, groups: list[Any]) -> list[Any]:
        """Groups of parameters as groups with one label each, and the options that go with it."""
        groups = [g if isinstance(g, dict) else {"params": groups} for g in groups][: None if is_groups(groups) else 1]
        taken = self._paths() if self._ready else {}
        entries = [(g, *entry) for g in groups for entry in entries_of(g.get("params"))]
        if not all([isinstance(p, Tensor) for _, _, p in entries]) or any([isinstance(g.get("params"), set) for g in groups]):
            return groups  # refused by torch
        paths = dict(taken)
        for _, name, p in entries:
            paths.setdefault(p, str(len(paths)) if name is None else name)
        links = self._recipe.links
        memo: Memo = {}
        spec = spec_of(paths, [m for link in links for m in link.masks], any([name is not None for _, name, _ in entries]))
        self._numbers = self._numbers | {p: int(paths[p]) for _, name, p in entries if name is None}
        lazy, ahead = {p for p in paths if is_lazy(p)}, ""
        ways = [select(outer(link.masks), [None if p in lazy else p for p in paths], spec, memo) for link in links]
        if not self._ready and not lazy:
            refuse_unused([m for link in links for m in link.masks], memo)
        active = dict(zip(paths, zip(*ways)))
        labels = {p: self._route(active[p]) for _, _, p in entries if p not in lazy}
        if lazy:
            self._lazy_paths = paths
            ahead = self._routes_ahead()
            labels |= dict.fromkeys(lazy, ahead)  # until they have a shape
        made: list[dict[str, Any]] = []
        for g in groups:
            parts: dict[str, list[Any]] = {}
            waiting = [p for own, _, p in entries if own is g and p in lazy]
            if waiting:  # groups for all labels, so that a scheduler that is made before the first step drives them
                ahead_of = list(self._routes) if "label" not in g else [str(g["label"])]
                parts = {label: [] for label in ahead_of}
                start = len(made) + (len(self.param_groups) if self._ready else 0)
                self._lazy.update(dict.fromkeys(waiting, range(start, start + len(parts))))
                labels |= dict.fromkeys(waiting, g.get("label", ahead))
            for own, name, p in entries:
                if own is g:
                    parts.setdefault(labels[p], []).append(p if name is None else (name, p))
            for label in sorted(parts, key=lambda label: self._routes[label].links):
                params = parts[label]
                if g.get("label", label) != label:
                    raise ValueError(f"A group is labelled {g['label']!r}, but some of its parameters are {label!r}.")
                first = self._routes[label].first
                others = {n for r in self._routes.values() for n in r.first} - set(first)
                given = {n: x for n, x in g.items() if n not in others}
                names: dict[str, Any] = (
                    {"param_names": []} if not params and any([name is not None for _, name, _ in entries]) else {}
                )
                made.append({**first, **given, "label": label, "params": params, **names})
            if not parts:
                made.append(g)
        return made

    def _routes_ahead(self) -> str:
        """Make a route for each label that a parameter may yet get; the first of them."""
        links = self._recipe.links
        stacks = [[m for m in outer(link.masks) if isinstance(m, Label)] for link in links]
        found = []
        for top in {id(stack[-1].labels): stack[-1].labels for stack in stacks if stack}.values():
            for label in top.known:
                active = [
                    all([m.label == (label if m.labels is top else m.labels.known[0]) for m in stack]) for stack in stacks
                ]
                found.append(self._route(tuple(active)))
        return found[0]

    def _decide(self) -> None:
        """Give the parameters that have got a shape to the part of the transform that their label says, before the first step.

        Raises:
            ValueError: a label that no parameter has, a parameter that a transform cannot treat. Nothing has changed then.
        """
        ready = {p for p in self._lazy if not is_lazy(p)}
        if not ready:
            return
        paths, links, memo = self._lazy_paths, self._recipe.links, Memo()
        masks = [m for link in links for m in link.masks]
        spec = spec_of(paths, masks, any(["param_names" in g for g in self.param_groups]))
        known = [None if is_lazy(p) else p for p in paths]
        ways = [select(outer(link.masks), known, spec, memo) for link in links]
        if None not in known:
            refuse_unused(masks, memo)
        for p, active in zip(paths, zip(*ways)):
            if p in ready:
                self._place_in(p, self._route(active))
        if None in known:
            self._lazy = {p: kin for p, kin in self._lazy.items() if p not in ready}
        else:
            self._lazy, self._lazy_paths = {}, {}
        self._made, self._looks = [], {}
        self._refuse([{**g, "params": [p for p in g["params"] if p in ready]} for g in self.param_groups])

    def _place_in(self, p: Tensor, label: str) -> None:
        """Move a parameter to the group with this label, among those that its own was split into."""
        groups, order = self.param_groups, {q: k for k, q in enumerate(self._lazy_paths)}
        old = next(g for g in groups if any([q is p for q in g["params"]]))
        new = next((groups[k] for k in self._lazy[p] if groups[k]["label"] == label), None)
        if new is None:
            first = self._routes[label].first
            options = {n: x for n, x in old.items() if n in first or n in self.defaults}
            new = {**first, **options, "label": label, "params": [], **({"param_names": []} if "param_names" in old else {})}
            super().add_param_group(new)
            self._schedules.take(new, first)
        if new is old:
            return
        at = next(k for k, q in enumerate(old["params"]) if q is p)
        to = len([q for q in new["params"] if order[q] < order[p]])
        for name in ("params", "param_names") if "param_names" in old else ("params",):
            new[name] = [*new[name][:to], old[name][at], *new[name][to:]]
            old[name] = [*old[name][:at], *old[name][at + 1 :]]

    def _route(self, active: tuple[bool, ...]) -> str:
        """The label of the parameters on which these links of the transform act."""
        links = [(i, link) for i, (link, yes) in enumerate(zip(self._recipe.links, active)) if yes]
        places = tuple([i for i, _ in links])
        plain = "+".join(dict.fromkeys([name for _, link in links if (name := route(link.masks))])) or "unlabelled"
        alike = [
            label for label in (plain, *[f"{plain}#{k}" for k in range(2, len(self._routes) + 2)]) if label in self._routes
        ]
        label = next((x for x in alike if self._routes[x].links == places), f"{plain}#{len(alike) + 1}" if alike else plain)
        if label not in self._routes:
            parts = []
            for _, link in links:
                part: Transform = link.transform
                for mask in link.masks[: len(link.masks) - len(outer(link.masks))]:
                    part = masked(part, mask)
                parts.append(part)
            own = chain(*parts)
            full = {(i, plain): name for name, i, plain, _ in self._recipe._named(hypers=True)}
            names = {name: full[links[k][0], plain] for name, k, plain, _ in own._named(hypers=True)}
            self._routes[label] = Route(own, own.hyperparams, names, places)
        return label

    def _routed(self, group: Mapping[str, Any], strict: bool) -> Transform:
        """The part of the transform that a group's label has, with the group's options.

        A transform that sees all parameters together is kept whole, with the options of all groups: their own for this
        group's, and for every other label those of its first group.
        """
        mine, group = self._routes[group["label"]], self._schedules.options(group)
        changes = {n: group[n] for n, x in mine.first.items() if not unchanged(x, group[n])}
        transform = mine.transform._replace(changes, strict)
        if not self._recipe.plan.whole:
            return transform
        every: dict[str, Any] = {}
        for g in [*reversed([g for g in self.param_groups if g["label"] != group["label"]]), group]:
            own, g = self._routes[g["label"]], self._schedules.options(g)
            every |= {own.names[n]: g[n] for n in own.first}
        return self._recipe._replace(every, strict)

    def _refuse(self, groups: list[dict[str, Any]]) -> None:
        """Refuse parameters that a transform cannot treat."""
        paths = self._paths()
        for group in groups:
            for link in self._transform(group).links:
                requires = link.transform.declaration.requires
                flat = any(map(flattened, group["params"]))
                if (requires is None and not flat) or is_off(link.transform):
                    continue
                for p, yes in zip(group["params"], self._selected(link.masks, group["params"])):
                    if yes and flattened(p):
                        refuse_flat(link.transform, quote(paths[p]), p)
                    if yes and requires is not None and not is_lazy(p):
                        requires(quote(paths[p]), p)

    def _begin_state(self, groups: list[dict[str, Any]]) -> None:
        """Make the state of parameters before their first step; frozen ones have none until they get a gradient."""
        for group in groups:
            begun = [p for p in group["params"] if p.requires_grad and not is_lazy(p)]
            transform = self._transform(group)
            with torch.no_grad():
                self._fill(begun, transform)
                for link in transform.links if begun and not traced() else ():
                    if not link.transform.declaration.whole:
                        self._begins_from(link.transform, min(begun, key=Tensor.numel))
            self._remember(begun, transform)

    # -- state

    def _remember(self, params: list[Tensor], transform: Transform) -> None:
        """Keep in mind how the state of these parameters began."""
        options = options_in(transform)
        self._untouched.update((p, Begun.of(p, self._place.without(self.state.get(p, NOTHING)), options)) for p in params)
        self._begun_shared.update((n, (x, x._version)) for n, x in self.shared.items() if isinstance(x, Tensor))

    def _forget(self) -> None:
        """Drop the state that was made for parameters which have left their groups before their first step."""
        there = {p for group in self.param_groups for p in group["params"]}
        gone = [p for p in self._untouched if p not in there]
        if gone:
            self._place.move(self.state, self.param_groups)
        for p in gone:
            del self._untouched[p]
            self.state.pop(p, None)
        if gone:
            new = {p for p in there if p not in self.state}
            groups = [{**g, "params": [p for p in g["params"] if p in new]} for g in self.param_groups]
            self._begin_state([g for g in groups if g["params"]])

    def _fill(self, params: list[Tensor], transform: Transform) -> None:
        """Give these parameters whatever of their state is missing."""
        keys = transform.plan.keys
        counters: dict[Any, list[tuple[dict[str, Any], Tensor]]] = {}
        columns: dict[Any, list[tuple[dict[str, Any], Tensor]]] = {}
        for k, link in enumerate(transform.links):
            value, names = link.transform, keys[k]
            if is_off(value) or not names:
                continue
            if value.declaration.whole:
                self._fill_whole(link, names, bool(transform.plan.extras))
                continue
            on = self._selected(link.masks, params)
            for p, yes in zip(params, on):
                state = self.state[p]
                if not yes or all([name in state for name in names]):
                    continue
                fields, info = fresh_state(value, p), fields_of(value)
                resumed = len(names) > 1 and "step" not in state and any([name in state for name in names])
                for name, scalar, like, x in zip(names, info.scalars, info.like, fields):
                    if name in state or x is None:
                        continue
                    if resumed and name == "step":
                        x += 1  # a checkpoint of torch's that does not count steps, but has made some
                    state[name] = x
                    if scalar and not x.requires_grad:
                        counters.setdefault((name, x.dtype, x.device), []).append((state, x))
                    elif like:
                        columns.setdefault((k, name), []).append((state, x))
        if torch.compiler.is_compiling():
            return
        for (name, *_), entries in counters.items():
            if len(entries) > 1:
                for (state, _), x in zip(entries, together([x for _, x in entries])):
                    state[name] = x
        packs = packed_links(transform.plan) if plain(params) and small(params) else ()
        for (k, name), entries in columns.items():
            xs = [x for _, x in entries]
            if k in packs and packable(xs):
                for (state, _), x in zip(entries, apart(joined(xs), [x.shape for x in xs])):
                    state[name] = x

    def _fill_whole(self, link: Link, names: tuple[str, ...], frozen: bool) -> None:
        """The same for a whole transform, which begins with all parameters: its own fields are kept under one key."""
        value, params = link.transform, self._members(link, frozen)
        for name, leaf, x in zip(names, fields_of(value).leaves, fresh_whole_state(value, params)):
            if not leaf:
                self.shared.setdefault(name, x)
                continue
            missing = [(p, y) for p, y in zip(params, x) if name not in self.state[p]]
            ys = [y for _, y in missing]
            if len(ys) > 1 and fields_of(value).scalars[names.index(name)]:
                ys = together(ys)
            for (p, _), y in zip(missing, ys):
                self.state[p][name] = y

    def _members(self, link: Link, frozen: bool) -> list[Tensor]:
        """The parameters that a whole transform begins with; a function of all parameters is one of the frozen ones, too."""
        params = [p for group in self.param_groups for p in group["params"] if not is_lazy(p)]
        if not frozen:
            params = [p for p in params if p.requires_grad or p.grad is not None]
        return [p for p, yes in zip(params, self._selected(link.masks, params)) if yes]

    # -- before the first step of a parameter

    def _set_aside(self, everything: bool) -> None:
        """Take the state with which nothing was computed from parameters that are about to step.

        Hooks and subclasses that make a state where there is none find none, as in torch. What they do not make is put back.
        """
        self._forget()
        for p, begun in self._untouched.items():
            state = self.state.get(p)
            if state is None or not (everything or p.grad is not None):
                continue
            own = begun.own(state)
            for name in own:
                del state[name]
            self._aside[p] = own, set(state)

    def _renew(self) -> None:
        """Make the state of parameters without a step anew where options have changed: what is saved goes with them."""
        for group, transform in zip(self.param_groups, self._transforms()):
            options = options_in(transform)
            stale = [p for p in group["params"] if p in self._untouched and not same(self._untouched[p].options, options)]
            owns = [self._untouched[p].own(self.state.get(p, NOTHING)) for p in stale]
            given = [self.state.get(p, NOTHING).keys() - own.keys() for p, own in zip(stale, owns)]
            for p, own in zip(stale, owns):
                for name in own:
                    del self.state[p][name]
            with torch.no_grad():
                self._fill(stale, transform)
            for p, own, names in zip(stale, owns, given):
                state = self.state.get(p, NOTHING)
                made = {n: renewed(own.get(n), x) for n, x in state.items() if n not in names}
                self.state[p].update(made)
                self._untouched[p] = Begun.of(p, made, options)

    def _put_back(self) -> None:
        """Undo `_set_aside` for parameters that made no step after all."""
        for p, (own, others) in self._aside.items():
            begun, state = self._untouched.get(p), self.state[p]
            if begun is None:
                continue
            if set(state) == others:
                ordered = {n: own.get(n, state.get(n)) for n in begun.fields if n in own or n in state}
                rest = {n: x for n, x in state.items() if n not in ordered}
                state.clear()
                state.update(ordered)
                state.update(rest)
            else:
                del self._untouched[p]  # a step that is not ours has made a state of its own
        self._aside.clear()

    def _touch(self, params: list[Tensor], transform: Transform) -> None:
        """Before the first step of some of these parameters: make anew what depends on values that may have changed."""
        first = [p for p in dict.fromkeys(params) if p in self._untouched]
        if not first:
            return
        beginning = all([p in self._untouched for g in self.param_groups for p in g["params"] if p.requires_grad])
        begun, states, owns = [], [], []
        for p in first:
            begun.append(self._untouched[p])
            states.append(self.state[p] if begun[-1].fields or p in self.state else {})
            owns.append(self._aside.pop(p)[0] if p in self._aside else begun[-1].own(states[-1]))
            for name, x in owns[-1].items():
                if states[-1].get(name) is x:
                    del states[-1][name]
        mine = [set(state) for state in states]  # what the user has made
        options, keys = options_in(transform), transform.plan.keys
        for k, link in enumerate(transform.links):
            value, names = link.transform, keys[k]
            if is_off(value) or not names:
                continue
            on = self._selected(link.masks, first)
            if value.declaration.whole:
                entries = {p: entry for p, yes, *entry in zip(first, on, states, owns, begun) if yes}
                self._touch_whole(link, names, entries, beginning, bool(transform.plan.extras))
                continue
            for p, yes, old, state, own, given in zip(first, on, begun, states, owns, mine):
                if not yes:
                    continue
                again = old.kind != kind(p) or self._begins_from(value, p)
                again |= not same(old.options.get(names[0]), options.get(names[0]))
                again |= torch.is_grad_enabled() and bool(options.get(names[0]))  # options that a derivative is taken of
                fields = dict(zip(names, fresh_state(value, p))) if again else own
                for name in names:
                    if name not in given and fields.get(name) is not None:
                        state[name] = renewed(own.get(name), fields[name]) if again else own[name]
                if self._uncounted & given & set(names) and "step" in own and "step" not in given:
                    state["step"] = own["step"].fill_(1)
        for p in first:
            del self._untouched[p]

    def _touch_whole(
        self, link: Link, names: tuple[str, ...], entries: dict[Tensor, list[Any]], beginning: bool, frozen: bool
    ) -> None:
        """The same for a whole transform: what it keeps per parameter, and its own fields before the very first step."""
        value = link.transform
        leaves = fields_of(value).leaves
        if not entries:
            return
        changed = any([old.kind != kind(p) for p, (_, _, old) in entries.items()])
        again = set(range(len(names))) if changed else self._fields_from(value, min(entries, key=Tensor.numel))
        members = list(dict.fromkeys([*self._members(link, frozen), *entries]))
        fresh = fresh_whole_state(value, members) if again else ()
        for f, (name, leaf) in enumerate(zip(names, leaves)):
            column = dict(zip(members, fresh[f])) if leaf and f in again else {}
            for p, (state, own, _) in entries.items():
                if leaf and name in own and name not in state:
                    state[name] = renewed(own[name], column[p]) if f in again else own[name]
            if not leaf and f in again and beginning:
                shared = self.shared
                first = self._begun_shared.get(name)
                if first is not None and shared.get(name) is first[0] and first[0]._version == first[1]:
                    shared[name] = renewed(first[0], fresh[f])

    def _fields_from(self, value: Any, p: Tensor) -> set[int]:
        """Which fields of a whole transform's first state depend on the values of the parameters, by their number."""
        found = self._reads.get(value.declaration)
        if found is None:
            if traced() or p.is_meta:
                return set(range(len(fields_of(value).names)))
            found = self._reads[value.declaration] = reads_whole(value, p.detach())
        return found

    def _begins_from(self, value: Any, p: Tensor) -> bool:
        """Whether the first state of a leafwise transform depends on the values of a parameter."""
        found = self._reads.get(value.declaration)
        if found is None:
            if traced() or p.is_meta:
                return True
            found = self._reads[value.declaration] = reads(value, p.detach())
        return found

    def _paths(self) -> dict[Tensor, str]:
        """The path of each parameter: its name or, without names, its number in the order in which parameters were given."""
        paths: dict[Tensor, str] = {}
        unnamed: list[Tensor] = []
        for group in self.param_groups:
            if "param_names" in group:
                paths.update(zip(group["params"], group["param_names"]))
            else:
                unnamed += group["params"]
        if not self._numbers:  # only a partition, which parts the groups anew, changes the order
            return paths | {p: str(k) for k, p in enumerate(dict.fromkeys(unnamed), start=len(paths))}
        numbers = {p: self._numbers[p] for p in unnamed if p in self._numbers}  # others have left the groups
        free = iter(set(range(len(unnamed) + len(self._numbers))) - set(numbers.values()))
        numbers |= {p: next(free) for p in unnamed if p not in numbers}
        self._numbers = numbers
        return paths | {p: str(n) for p, n in sorted(numbers.items(), key=operator.itemgetter(1))}

    def _selected(self, masks: tuple[Any, ...], params: list[Tensor]) -> list[bool]:
        """Which of some parameters these masks select. They are asked once about each."""
        if not masks:
            return [True] * len(params)
        key = tuple(map(identity, masks))
        known = self._known.get(key, {})
        new = {p for p in params if p not in known and not is_lazy(p)}  # those have no shape yet that could be asked for
        if new:
            paths = self._paths()
            spec = spec_of(paths, masks, "param_names" in self.param_groups[0])
            asked = (
                new if self._routes else {p for p in paths if not is_lazy(p)}
            )  # a mask in one part is not asked about the others'
            values = select(masks, [p if p in asked else None for p in paths], spec)
            kept = {p: yes for p, yes in known.items() if p in paths}  # what has left the groups is not kept alive
            known = self._known[key] = kept | {p: yes for p, yes in zip(paths, values) if p in asked}
        return [known.get(p, False) for p in params]

    @property
    def shared(self) -> Shared:
        """What transforms that see all parameters together keep beside the state of each parameter, by its names.

        It can be written to. In `state` and in a state dict it is under the first parameter that is trained, each name with
        ``shared.`` before it.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> opt = optim.Optimizer([p], ps.skip_if_nonfinite(ps.sgd(lr=0.1)))
        >>> p.grad = torch.full((2,), float("nan"))
        >>> opt.step()
        >>> opt.shared["skipped"], opt.state[p]["shared.skipped"]
        (tensor(1.), tensor(1.))
        """
        return self._place.of(self.state, self.param_groups)

    # -- averages

    def eval_params(self) -> dict[str, Tensor]:
        """The parameters to evaluate a model with: what an algorithm's state says their average is, else the parameters.

        A parameter that was never updated has no average, and is what it is. The tensors are not copies: they may change with
        the next step.

        Returns:
            one tensor for each parameter, by its name, or by its number where the optimizer was not given names; in the order
            of the groups.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = optim.Optimizer(model.named_parameters(), ps.chain(ps.sgd(lr=1.0), ps.ema_params(0.5)))
        >>> for _ in range(3):
        ...     model.weight.grad = torch.ones(1, 1)
        ...     opt.step()
        >>> averages = opt.eval_params()
        >>> (averages["weight"] - model.weight).item()
        0.75
        >>> y = torch.func.functional_call(model, averages, torch.ones(1))

        See also `use_eval_params`, which puts them into the parameters for a while.
        """
        averages = self._averages()
        paths = self._paths().items()
        return {path: averages[p] if p in averages else p if is_lazy(p) else p.detach() for p, path in paths}

    @torch.no_grad()
    def _averages(self) -> dict[Tensor, Tensor]:
        """The averages of the parameters that have one."""
        found: dict[Tensor, Tensor] = {}
        for group, transform in zip(self.param_groups, self._transforms()):
            self._find_averages(found, group["params"], transform)
        return found

    def _find_averages(self, found: dict[Tensor, Tensor], params: list[Tensor], transform: Transform) -> None:
        """Add the averages that are in the state of a transform; the first link that has one for a parameter decides."""
        for link, names, off in zip(transform.links, transform.plan.keys, transform.plan.off):
            kind: Any = state_type(link.transform)
            if off or not (hasattr(kind, "evaluated") or hasattr(kind, "averaged")):
                continue
            info = fields_of(link.transform)
            for p, yes in zip(params, self._selected(link.masks, params)):
                own = self.state.get(p, NOTHING)
                fields = [own.get(n) if leaf else self.shared.get(n) for n, leaf in zip(names, info.leaves)]
                if p in found or not yes or any([x is None for x in fields]):
                    continue
                if hasattr(kind, "averaged"):
                    inner = [None] if link.transform.declaration.inner else []
                    (found[p],) = kind(*[[x] if leaf else x for x, leaf in zip(fields, info.leaves)], *inner).averaged()
                    continue
                state = kind(*fields)
                new = state.step == 0
                if not readable(new):
                    found[p] = where(new, p.detach(), state.evaluated(p.detach()))
                elif not new:
                    found[p] = state.evaluated(p.detach())

    @contextlib.contextmanager
    def use_eval_params(self) -> Iterator[None]:
        """For as long as a ``with`` lasts, the parameters have the values of `eval_params`; then they have their own again.

        The tensors stay the same, and so does every bit of what they held, even after an exception. No step can be made inside.
        What else a model keeps, such as the statistics of batch normalization, is not touched.

        Raises:
            RuntimeError: it is inside another one.

        >>> import torch, purestep as ps
        >>> from purestep import optim
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> opt = optim.ASGD([p], lr=1.0, lambd=0.0, t0=0)
        >>> for _ in range(3):
        ...     p.grad = torch.ones(1)
        ...     opt.step()
        >>> with opt.use_eval_params():
        ...     print(p.item())
        -2.5
        >>> p.item()
        -3.0
        """
        if self._evaluating:
            raise RuntimeError("use_eval_params is inside another one: the parameters are the averages already.")
        averages = self._averages()
        with torch.no_grad():
            before = [p.clone() for p in averages]
        self._evaluating = True
        try:
            with torch.no_grad():
                for p, x in averages.items():
                    p.copy_(x)
            yield
        finally:
            with torch.no_grad():
                for p, x in zip(averages, before):
                    p.copy_(x)
            self._evaluating = False

    # -- the step

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps every `step` in: hooks, and a range in the profile. It costs nothing where there are neither."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                or STEP_PRE_HOOKS or STEP_POST_HOOKS or profiling()
            ):  # fmt: skip
                return watched(self, *args, **kwargs)
            out = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return out

        @functools.wraps(func)
        def begin(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self._untouched or self._aside or torch.compiler.is_compiling():
                return step(self, *args, **kwargs)
            self._set_aside(bool(args or kwargs))
            try:
                return step(self, *args, **kwargs)
            finally:
                self._put_back()

        return begin

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters from their gradients; parameters without one stay as they are.

        Args:
            closure: clears the gradients, evaluates the model, calls `backward` and returns the loss.

        Returns:
            the closure's loss, if there is a closure.
        """
        if self._lazy:
            self._decide()
        if self._evaluating:
            raise RuntimeError("No step can be made inside use_eval_params: the parameters are averages. Leave it first.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            self._step_scaled(closure, loss)
        else:
            self._step(closure, loss)
        return loss

    def _step(self, closure: Any, loss: Any) -> None:
        """One update from the gradients that are there."""
        if self._check_fused:
            for group in self.param_groups:
                for p in group["params"] if group.get("fused") else ():
                    if p.grad is not None:
                        check_fused_device_and_dtype(p)
            self._check_fused = False
        grad = torch.is_grad_enabled()
        set_grad_mode(bool(self.defaults.get("differentiable")))
        try:
            groups = list(zip(self.param_groups, self._transforms()))
            if groups[0][1].plan.whole:
                self._advance(groups, self._extras(groups[0][1].plan, closure, loss), loss)
            else:
                if len(groups) > 1:
                    self._rehearse(groups)
                for pair in groups:
                    if not self._again(*pair):
                        self._advance([pair])
        finally:
            set_grad_mode(grad)
        if self._schedules and not torch.compiler.is_compiling():
            self._show(groups)

    def _step_scaled(self, closure: Any, loss: Any) -> None:
        """A step as a gradient scaler asks for it, as torch's fused kernels do it; on a device nothing is waited for.

        Gradients are divided by `grad_scale`, and where `found_inf` is not 0 nothing is changed.
        """
        found: Any = getattr(self, "found_inf", None)
        scale: Any = getattr(self, "grad_scale", None)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if closure is not None and any([t.plan.extras & {"value_and_grad"} for t in self._transforms()]):
            raise RuntimeError(
                f"{type(self).__name__} evaluates its closure more than once, so its gradients cannot be unscaled for it. Let "
                "the closure return an unscaled loss and gradients, and do without a gradient scaler."
            )
        read = found is None or readable(found)
        if found is not None and read and found.item():
            return
        if scale is not None:
            with torch.no_grad():
                for p in params:
                    p.grad.div_(scale.to(p.grad.device).reshape(()))
        if read:
            self._step(closure, loss)
            return
        flag = torch.as_tensor(found).reshape(()) != 0
        for group, transform in zip(self.param_groups, self._transforms()):  # what there is to go back to
            mine = [p for p in group["params"] if p.grad is not None]
            with torch.no_grad():
                self._touch(mine, transform)
                self._fill(mine, transform)
        states = [
            (p, dict(self.state[p])) for p in [q for group in self.param_groups for q in group["params"]] if p in self.state
        ]
        before = [(p, p.detach().clone()) for p in params]
        kept = [(p, {name: x.clone() for name, x in own.items() if isinstance(x, Tensor)}) for p, own in states]
        self._step(closure, loss)
        with torch.no_grad():
            for p, x in before:
                p.copy_(torch.where(flag.to(p.device), x, p))
            for p, own in kept:
                for name, x in own.items():
                    new = self.state[p].get(name)
                    if isinstance(new, Tensor):
                        new.copy_(torch.where(flag.to(x.device), x, new))

    def _rehearse(self, groups: list[tuple[dict[str, Any], Transform]]) -> None:
        """Call what a step calls of a user's, before any group has changed: where it raises, all are left as they are."""
        if torch.compiler.is_compiling():
            return
        for k, (group, transform) in enumerate(groups):
            for name, x in self._schedules.of(group).items():
                count = self._updates(group, transform, option := x.option(group, name))
                if follows(option):
                    number(option, int(count) if count is not None and readable(torch.as_tensor(count)) else x.steps)
            if self._rehearsed.get(k) is transform or self._executor(group) == "leaf":
                continue
            self._rehearsed[k] = transform
            recipe = tuple([tree_structure(link.transform) for link in transform.links])
            if recipe not in self._recipes and can_begin(transform):
                transform.program(donate=True)
            self._recipes.add(recipe)

    def _show(self, groups: list[tuple[dict[str, Any], Transform]], exactly: bool = False) -> None:
        """Show in the groups the numbers that schedules had at the last step.

        A counter on a device is waited for only if they are to be shown `exactly`; else the steps are counted here.
        """
        for group, transform in groups:

            def count(schedule: Any, group: dict[str, Any] = group, transform: Transform = transform) -> int | None:
                x = self._updates(group, transform, schedule)
                if isinstance(x, Tensor) and not (readable(x) or (exactly and not x.is_meta)):
                    return None
                return None if x is None else int(x)

            self._schedules.show(group, count)

    def _updates(self, group: dict[str, Any], transform: Transform, schedule: Any) -> Any:
        """How many updates the part of a transform that follows this schedule has made, of the first parameter that moved."""
        wanted = {id(x) for x in (schedule if isinstance(schedule, tuple) else (schedule,)) if follows(x)}
        for link, names, info in zip(transform.links, transform.plan.keys, transform.plan.fields):
            given = link.transform.arguments.values()
            if info.step < 0 or not wanted & {id(y) for x in given for y in (x if isinstance(x, tuple) else (x,))}:
                continue
            key = names[info.step]
            if not info.leaves[info.step]:
                return self.shared.get(key)
            states = [(p, s) for p in group["params"] if (s := self.state.get(p, NOTHING)) and key in s]
            return next(chained([s[key] for p, s in states if p.grad is not None], [s[key] for _, s in states]), None)
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, or set them to zero; see `torch.optim.Optimizer.zero_grad`."""
        if not set_to_none or profiling():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _extras(self, plan: Plan, closure: Any, loss: Any) -> dict[str, Any]:
        """What transforms ask for at each update, as far as a closure and its last value can give it."""
        for link in plan.links:
            who = link.transform.declaration.name
            for name in link.transform.declaration.extras:
                if name not in FROM_CLOSURE:
                    raise TypeError(
                        f"{who} needs {name}, which an optimizer cannot give it: a closure gives {' and '.join(FROM_CLOSURE)}. "
                        f"Call the transform itself: transform.step(grads, state, params, {name}=...)."
                    )
                if closure is None:
                    raise TypeError(
                        f"{who} needs {name}, so step needs a closure: step(closure), which clears the gradients, evaluates "
                        "the model, calls backward and returns the loss."
                    )
                loss = sharded.whole(loss)
                loss = loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else loss
                check_value(loss, f"What the closure returns, the loss for {who}")
        return {name: {"value": loss, "value_and_grad": closure}[name] for name in plan.extras}

    def _again(self, group: dict[str, Any], transform: Transform) -> bool:
        """What `_advance` did last, without what has to be asked only once; False, and nothing done, if more is new."""
        params, executor = group["params"], self._executor(group)
        if not params or executor == "leaf" or (self._untouched and any([p in self._untouched for p in params])):
            return False
        if torch.is_grad_enabled() or choose(None) != "program":
            return False
        solo = solo_of(transform._plan or transform.plan)
        if solo is None:
            return False
        looks = self._looks.get(id(group))
        if looks is None:
            looks = self._looks[id(group)] = Looks()
        return solo.again(looks, [p.grad for p in params], params, self._states(params), executor)

    def _states(self, params: list[Tensor]) -> list[Mapping[str, Any]]:
        """The state of each of these parameters. One group's are found in order, without a look at each parameter's hash."""
        if len(self.state) == len(params) and all(map(operator.is_, self.state, params)):
            return list(self.state.values())
        return [self.state.get(p, NOTHING) for p in params]

    def _advance(
        self, groups: list[tuple[dict[str, Any], Transform]], extras: Mapping[str, Any] = NOTHING, loss: Any = None
    ) -> None:
        """One update of the parameters of these groups, which the transforms see together; `loss` is the closure's."""
        params: list[Tensor] = []
        grads: list[Any] = []
        together_: list[Group] = []
        for group, transform in groups:
            own = group["params"]
            given = [p.grad for p in own]
            if "value_and_grad" in extras:  # a function of all parameters has a gradient for each
                given = [torch.zeros_like(p) if g is None else g for p, g in zip(own, given)]
            if type(None) in set(map(type, given)):
                own = [p for p, g in zip(own, given) if g is not None]
                given = [g for g in given if g is not None]
            together_.append(Group(transform.plan, range(len(params), len(params) + len(own))))
            params += own
            grads += given
        if not params:
            return
        self._accept(grads, params)
        if self._untouched:
            for rows, (_, transform) in zip(together_, groups):
                self._touch(params[rows.rows.start : rows.rows.stop], transform)
        stateless = all([g.plan.stateless for g in together_])
        states: list[dict[str, Any]] = [{}] * len(params) if stateless else list(map(self.state.__getitem__, params))
        keys = together_[0].plan.keys
        try:
            columns = self._gather(params, states, together_, keys)
        except KeyError:
            for rows, (_, transform) in zip(together_, groups):
                self._fill(params[rows.rows.start : rows.rows.stop], transform)
            columns = self._gather(params, states, together_, keys)
        if not plain(grads, params):
            like = together_[0].plan.alike(columns)
            grads = sharded.alike(grads, params, like, lambda k: quote(self._paths()[params[k]]))
        executor = self._executor(groups[0][0])
        if len(groups) > 1:
            refuse_disagreement(together_)
        seen: tuple[Any, ...] = ()
        if torch.is_grad_enabled():
            fields = [c if isinstance(c, list) else [c] for c in chained.from_iterable(columns)]
            seen = (params, grads, *fields, *[g.plan.tensors for g in together_])
        mode: Mode = choose(executor, *seen)
        before = list(map(list, columns))
        columns = self._represented(columns, together_[0].plan)
        given_columns = list(map(list, columns))
        # where autograd looks on, the graph keeps the old values while the parameters are overwritten
        given = (
            [p.clone() for p in params] if torch.is_grad_enabled() else clones(params) if "value_and_grad" in extras else params
        )
        if "value_and_grad" in extras:
            extras = {**extras, "value_and_grad": value_and_grad(given, params, grads, loss, extras["value_and_grad"])}
        touched = None
        if not all([g.layout is torch.strided for g in grads]):
            touched = Touched(
                grads,
                given,
                columns,
                together_,
                lambda masks: self._selected(masks, params),
                lambda k: self._paths()[params[k]],
            )
            grads, given, columns = touched.grads, touched.params, touched.states
        call = Call(
            grads, given, columns, lambda masks: self._selected(masks, params), mode,
            apply=True, donate=not torch.is_grad_enabled(), alone=False, executor=executor, private=True,
            copies=touched is None and "value_and_grad" in extras, extras=extras,
        )  # fmt: skip
        try:
            out, after = call.run(together_)
        except BaseException as error:
            if "value_and_grad" in extras and not self._keep_progress(error, together_[0].plan):
                overwrite(params, given)
            raise
        if touched is not None:
            out, after = touched.scatter(out, after, True, call.donate)
        if torch.is_grad_enabled():
            for p, x in zip(params, out):
                if x is not p:
                    p.copy_(x)
        elif not all(map(operator.is_, out, params)):
            overwrite(params, out)
        self._store(together_[0].plan, states, before, given_columns, after)

    def _represented(self, columns: list[Any], plan: Plan) -> list[Any]:
        """The state as the engine takes it, where counters that are equal are one tensor."""
        return [
            [
                self._counters.represented(c) if leaf and scalar and c else c
                for c, leaf, scalar in zip(own, info.leaves, info.scalars)
            ]
            for own, info in zip(columns, plan.fields)
        ]

    def _store(self, plan: Plan, states: list[dict[str, Any]], before: list[Any], given: list[Any], after: list[Any]) -> None:
        """Write the new state into the tensors of the old one; only what does not fit there takes its place."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for names, info, olds, used, news in zip(plan.keys, plan.fields, before, given, after):
            for name, leaf, scalar, like, old, known, new in zip(names, info.leaves, info.scalars, info.like, olds, used, news):
                if not leaf:  # a tensor that shares no memory with other fields, old or new, stays the tensor that it is
                    if new is not old:
                        around = [x for x in (*tree_leaves(olds), *tree_leaves(news)) if x is not old and x is not new]
                        alone = (scalar or like) and maths.memory(old) not in set(map(maths.memory, around))
                        self._settle(self.shared, name, old if alone else None, new, pairs)
                elif scalar and not any([(x is None and y is not None) or recorded(y) for x, y in zip(old, new)]):
                    self._counters.write(old, known, new)
                elif not all(map(operator.is_, known, new)):
                    for state, x, y in zip(states, old, new):
                        if x is not y:  # not where a mask is in the way: the name may be another link's too
                            self._settle(state, name, x, y, pairs)
        overwrite_all(pairs)

    def _settle(
        self, state: MutableMapping[str, Any], name: str, old: Any, new: Any, pairs: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Keep a new value: in the old tensor, if it fits there and nothing is recorded; such pairs are collected."""
        if fits_in(old, new):
            pairs.append((old, new))
        else:
            state[name] = new

    def _keep_progress(self, error: Any, plan: Plan) -> bool:
        """Keep the state that a closure's exception brings with it, for the parameters where the closure was evaluated."""
        progress: Any = getattr(error, "progress", ())
        fields = list(progress)
        if not fields or type(progress) is not state_type(plan.links[-1].transform):
            return False
        del error.progress
        for name, x in zip(plan.keys[-1], fields):
            self.shared[name] = x
        return True

    def _executor(self, group: Mapping[str, Any]) -> Executor | None:
        """What the flags ask of the engine."""
        if group.get("fused"):
            return "fused"
        if group.get("foreach") is False and group.get("fused") is None:
            return "leaf"
        if self._compile:
            return "compiled"
        return "foreach" if group.get("foreach") or group.get("fused") is False else None

    def _accept(self, grads: list[Tensor], params: list[Tensor]) -> None:
        """For a class to refuse gradients, before anything has changed."""

    def _gather(
        self, params: list[Tensor], states: list[dict[str, Any]], groups: list[Group], keys: list[tuple[str, ...]]
    ) -> list[Any]:
        """The state of these parameters as the engine takes it: per link, per field, a list."""
        columns: list[Any] = []
        for k, names in enumerate(keys):
            link = groups[0].plan.links[k]
            if not names:
                columns.append([])
            elif link.transform.declaration.whole:
                own, leaves = self.shared, groups[0].plan.fields[k].leaves
                on = list(zip(states, self._selected(link.masks, params)))
                columns.append([[s[n] if yes else None for s, yes in on] if leaf else own[n] for n, leaf in zip(names, leaves)])
            elif any([g.plan.optional[k] for g in groups]):
                columns.append([[s.get(n) for s in states] for n in names])
            else:
                found = [[s[n] for s in states] for n in names]
                if any([type(None) in set(map(type, column)) for column in found]):  # as good as missing
                    for s in states:
                        for name in [n for n in names if s[n] is None]:
                            del s[name]
                    raise KeyError
                columns.append(found)
        return columns

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.Optimizer.state_dict` gives it: of every parameter, from construction on."""
        self._forget()
        if self._lazy:
            self._decide()
        if self._untouched and not traced():
            self._renew()
        if self._schedules:
            self._show(list(zip(self.param_groups, self._transforms())), exactly=True)
        self._place.move(self.state, self.param_groups)
        hooks = self._optimizer_state_dict_post_hooks
        first: Any = type(self)._finish  # before the hooks of others
        try:
            self._optimizer_state_dict_post_hooks = OrderedDict([(-1, first), *hooks.items()])
            return super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks

    def _finish(self, saved: dict[str, Any]) -> None:
        """What is to be done to a state dict before its hooks see it."""
        if saved["state"] and not self._own_step:
            # torch's distributed checkpoints expect that all trained parameters have some state, or none has
            params = [p for group in self.param_groups for p in group["params"]]
            numbers = [k for group in saved["param_groups"] for k in group["params"]]
            for k in [k for k, p in zip(numbers, params) if p.requires_grad]:
                saved["state"].setdefault(k, {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, purestep's or torch's; see `torch.optim.Optimizer.load_state_dict`.

        As in torch, the state is cast to the dtypes of the parameters, but for one case: bfloat16 and float16 parameters
        keep a float32 state.

        Raises:
            ValueError: the groups or the shapes in it are not this optimizer's; nothing is changed then.
        """
        if self._lazy:
            self._decide()
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for hook in before.values():
            state_dict = hook(self, state_dict) or state_dict
        # torch.distributed.checkpoint leaves an empty dict where it was asked for a field that it does not have
        state_dict["state"] = {
            k: {n: x for n, x in v.items() if x is not None and x != {}} if isinstance(v, dict) else v
            for k, v in state_dict.get("state", {}).items()
        }
        shared = self._place.take(state_dict["state"])
        if self._routes and len(state_dict.get("param_groups", [])) == len(self.param_groups):
            state_dict["param_groups"] = [
                {"label": g["label"], **old} for old, g in zip(state_dict["param_groups"], self.param_groups)
            ]
        self._check_state(state_dict)
        self._check_shared(shared)
        everything = dict(self.__dict__)  # what is loaded replaces it, and writes on none of it
        begun = {p: (b.options, b.own(self.state.get(p, NOTHING))) for p, b in self._untouched.items()}
        try:
            self._optimizer_load_state_dict_pre_hooks = OrderedDict()  # they have run
            self._optimizer_load_state_dict_post_hooks = OrderedDict()  # they will
            super().load_state_dict(state_dict)
            self._keep_precision(state_dict, shared)
            for old, group, transform in zip(state_dict["param_groups"], self.param_groups, self._transforms()):
                self._lay_out(group, transform, anew=True)
                if any([link.span for link in transform.links]):
                    continue  # within another transform, what has made no step may have seen gradients
                for key, p in zip(old["params"], group["params"]):
                    if is_zero(self.state.get(p, NOTHING).get("step")):
                        self._remember([p], transform)
                        options, own = begun.get(p, ({}, {}))
                        if options and same(own, state_dict["state"].get(key, {})):  # a hook has put it among what is loaded
                            self._untouched[p] = self._untouched[p]._replace(options=options)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(everything)
            raise
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = before, after
        for report in after.values():
            report(self)

    def _keep_precision(self, state_dict: dict[str, Any], shared: dict[str, Any]) -> None:
        """Counters, codes, and the float32 state of half-precision parameters, as they were saved; torch has just cast them."""
        for old, group, transform in zip(state_dict["param_groups"], self.param_groups, self._transforms()):
            own = scalars_of(transform) | encoded_in(transform)
            for key, p in zip(old["params"], group["params"]):
                half = p.dtype in (torch.bfloat16, torch.float16)
                for name, x in state_dict["state"].get(key, {}).items():
                    if isinstance(x, Tensor) and (name in own or (half and x.dtype == torch.float32)):
                        self.state[p][name] = x.to(p.device, copy=True)
        if shared:
            self.shared.update(self._restored(shared))

    def _restored(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """What a loaded state has for all parameters together, as it was saved, in memory of its own."""
        device = self._place.first(self.param_groups).device
        return {name: tree_map_only(Tensor, lambda x: x.to(device, copy=True), x) for name, x in shared.items()}

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("param_groups", [])
        if len(saved) != len(self.param_groups):
            return  # torch says so
        for i, (group, own) in enumerate(zip(saved, self.param_groups)):
            if self._routes and group["label"] != own["label"]:
                raise ValueError(
                    f"Group {i} of the loaded state has the label {group['label']!r}, but here it is {own['label']!r}. Give "
                    "the optimizer its parameters and groups in the order in which they were saved."
                )
            for name in self._names(group):
                if name not in group and name not in self._fallback():
                    raise ValueError(
                        f"The loaded state has no option {name!r}, which {type(self).__name__} needs: it is another's."
                    )
        for old, group in zip(saved, self.param_groups):
            transform = self._transform({**self._fallback(), **old})
            names = group.get("param_names", old["params"])
            links = [
                (link, keys, self._selected(link.masks, group["params"]))
                for link, keys, off in zip(transform.links, transform.plan.keys, transform.plan.off)
                if keys and not off
            ]
            for k, (key, p, path) in enumerate(zip(old["params"], group["params"], names)):
                state = state_dict["state"].get(key, {})
                if not isinstance(state, dict):
                    raise ValueError(f"The loaded state of {path!r} must be a dict of its fields by name, but is {state!r}.")
                acting = [(link.transform, keys) for link, keys, on in links if on[k] and not is_lazy(p) and state]
                here = [any([state.get(name) is not None for name in keys if name != "step"]) for _, keys in acting]
                for (value, keys), found in zip(acting, here):
                    if found or value.declaration.off is None or not any(here):  # what was switched on later begins anew
                        self._check_fields(value, keys, state, p, path)

    def _check_fields(self, value: Primitive, keys: tuple[str, ...], state: dict[str, Any], p: Tensor, path: str) -> None:
        """Refuse what is loaded for one parameter if it is not what a transform has for it."""
        info, owner = fields_of(value), value.declaration.name
        whole = value.declaration.whole
        own = self.state.get(p, NOTHING)
        fresh = [own.get(name) for name in keys] if whole else fresh_state(value, like_meta(p))
        for name, like, encoded, scalar, leaf, new in zip(keys, info.like, info.encoded, info.scalars, info.leaves, fresh):
            x = state.get(name)
            if not leaf:
                continue
            if x is None:
                if (like or encoded) and new is not None:
                    raise ValueError(
                        f"The loaded state has no {name!r} for {path!r}, which {owner} needs: it is another algorithm's."
                    )
                continue
            if scalar:
                check_number(x, f"The loaded state's {name!r} for {path!r}", owner, p)
            elif isinstance(new, Tensor) or not whole:
                check_tensor(x, new, f"The loaded state has {name!r}", f"for {path!r}", owner, p)

    def _check_shared(self, shared: Mapping[str, Any]) -> None:
        """Refuse what is loaded for all parameters together if it is not what is there."""
        if not shared:
            return
        p = self._place.first(self.param_groups)
        for name, new in self.shared.items():
            x = shared.get(name)
            if x is None:
                continue
            if isinstance(new, Tensor) and not new.dim():
                check_number(x, f"The loaded state's {name!r}", "the transform that keeps it", p)
            elif isinstance(new, Tensor):
                check_tensor(x, new, f"The loaded state has {name!r}", "for all parameters", "the transform that keeps it", p)
            elif isinstance(new, tuple) and not (
                isinstance(x, (tuple, list)) and all([isinstance(y, (Tensor, int, float)) for y in tree_leaves(x)])
            ):
                raise ValueError(f"The loaded state's {name!r} must be several tensors, but is {x!r}.")

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in (*KEPT, "_begun_shared")},
            "_untouched": {p: x._replace(fields=x.made(self.state.get(p, NOTHING))) for p, x in self._untouched.items()},
            "_schedules": self._schedules.by_place(self.param_groups),
            "_own_step": self._own_step,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("_lazy", {})  # of older pickles
        before = state.get("_schedules", self._schedules.by_place(self.param_groups) if "_schedules" in self.__dict__ else [])
        super().__setstate__(state)
        self._schedules = Schedules.resumed(self.param_groups, before)
        for group in self.param_groups:
            self._schedules.take(group, [name for name in self._names(group) if name in group])
        self._made, self._looks, self._known, self._aside, self._reads = [], {}, {}, {}, {}
        self._rehearsed, self._recipes, self._place = {}, set(), self._new_place()
        self._counters = Counters()
        self._rates = self.__dict__.get("_rates", {})  # a graph reads them, whatever is loaded
        self._untouched = {p: x.again() for p, x in state.get("_untouched", {}).items()}
        self._begun_shared = {n: (x, x._version) for n, (x, _) in state.get("_begun_shared", {}).items()}
        for group in self.param_groups:
            for name, default in self._fallback().items():
                group.setdefault(name, default)
            group.update(self._constants)
        for group, transform in zip(self.param_groups, self._transforms()):
            self._lay_out(group, transform, anew=False)

    def _fallback(self) -> dict[str, Any]:
        """The options and flags that a checkpoint may be too old to know, with the values they had before they existed."""
        switches = {name: False for name in self._options if isinstance(self._first[name], bool)}
        flags = {name: None if name in ("foreach", "fused") else False for name in self._flags}
        return {**switches, **flags, **self._before}

    def _lay_out(self, group: dict[str, Any], transform: Transform, anew: bool) -> None:
        """Give each parameter of a group counters of its own, one after the other in memory.

        Copies of an optimizer keep their counters, which other processes may share, where these are tensors of their own.
        """
        for name in scalars_of(transform):
            kinds: dict[Any, list[tuple[dict[str, Any], Tensor]]] = {}
            for p in group["params"]:
                state = self.state.get(p, {})
                x = state.get(name)
                if isinstance(x, dict):  # torch's distributed checkpoints: no such entry
                    del state[name]
                elif x is not None:  # numbers, as torch saved them before 1.12, become tensors
                    x = x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float32)
                    kinds.setdefault((x.dtype, x.device), []).append((state, x))
            for entries in kinds.values():
                xs = [x for _, x in entries]
                if anew or not all([state[name] is x for state, x in entries]) or len({x.data_ptr() for x in xs}) < len(xs):
                    for (state, _), x in zip(entries, together(xs)):
                        state[name] = x


@whole()
def without_step(gs: list[Tensor], s: Any, params: list[Tensor]) -> tuple[list[Tensor], Any]:
    """What an optimizer runs whose class is to have its own `step`."""
    raise NotImplementedError(
        "This optimizer was made of a dict of options, so its class must have its own step. To run a transform, give it one: "
        "Optimizer(params, purestep.adamw(lr=3e-4))."
    )


def over(factory: Callable[..., Transform]) -> Callable[[F], F]:
    """Make an `__init__` run a factory: its arguments are the factory's, with `params` before them and torch's flags after."""
    wanted = tuple(inspect.signature(factory).parameters)

    def decorate(init: F) -> F:
        signature = mirrored(inspect.signature(init), getattr(torch.optim, init.__qualname__.partition(".")[0], None))

        @untraced
        @functools.wraps(init)
        def begin(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            flags = {name: given[name] for name in FLAGS if name in given}
            self._begin(given["params"], factory, {name: given[name] for name in wanted if name in given}, flags)

        begin.__signature__ = signature  # type: ignore[attr-defined]
        return begin  # type: ignore[return-value]

    return decorate


def mirrored(signature: inspect.Signature, theirs: Any) -> inspect.Signature:
    """The signature of a class without the options that its model in the installed torch is too old to have."""
    if theirs is None:
        return signature
    known = {"self", "compile", *inspect.signature(theirs).parameters}
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name in known])


def routed(transform: Transform) -> bool:
    """Whether a transform has different parts for different parameters."""
    return any([isinstance(m, Label) for link in transform.links for m in link.masks])


def outer(masks: tuple[Any, ...]) -> tuple[Any, ...]:
    """The masks down to the innermost label: those that decide which part of a transform a parameter is given to."""
    return masks[next((k for k, m in enumerate(masks) if isinstance(m, Label)), len(masks)) :]


def identity(mask: Any) -> Any:
    """What a mask is known by while the transform that it is part of is remade."""
    if isinstance(mask, Label):
        return id(mask.labels), mask.label
    return ("not", identity(mask.mask)) if isinstance(mask, Not) else id(mask)


def spec_of(paths: Mapping[Tensor, str], masks: Iterable[Any], named: bool) -> Spec:
    """How masks that are pytrees are laid out: by the parameters' names, or by their numbers."""

    def tree(mask: Any) -> Any:
        return tree(mask.mask) if isinstance(mask, Not) else mask.labels.labels if isinstance(mask, Label) else mask

    keys = tuple(paths.values())
    if named or any([isinstance(tree(m), dict) for m in masks]):
        return Spec(dict, keys, None)
    return Spec(list, tuple(range(len(keys))), None)


def is_groups(params: list[Any]) -> bool:
    """Whether an optimizer's first argument is a list of groups."""
    return bool(params) and isinstance(params[0], dict)


def entries_of(params: Any) -> list[tuple[Any, Any]]:
    """The parameters of a group with their names, if they have any."""
    entries = [params] if isinstance(params, Tensor) else list(params)
    return [e if isinstance(e, tuple) and len(e) == 2 else (None, e) for e in entries]


def options_in(transform: Transform) -> dict[str, Any]:
    """The hyperparameters that first states depend on, by the name of the first field of each state."""
    links = [(names, link.transform) for names, link in zip(transform.plan.keys, transform.links)]
    return {names[0]: options_of(value) for names, value in links if names and value.declaration.init_names}


def is_zero(x: Any) -> bool:
    """Whether this is a counter, and 0."""
    return isinstance(x, Tensor) and x.numel() == 1 and x.is_cpu and x.item() == 0


def packable(xs: list[Tensor]) -> bool:
    """Whether these can be consecutive pieces of one tensor."""
    first = xs[0]
    kinds = [(type(x), x.dtype, x.device) for x in xs]
    return type(first) is Tensor and alike(kinds) and all(map(Tensor.is_contiguous, xs)) and not first.requires_grad


def fits_in(old: Any, new: Any) -> bool:
    """Whether a new value of a state can be written into the tensor that holds the old one."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or torch.is_grad_enabled():
        return False
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device and type(old) is type(new)


def recorded(x: Any) -> bool:
    """Whether autograd follows this value."""
    return isinstance(x, Tensor) and x.requires_grad


def overwrite_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write the second of each pair into the first; a source that may lie in memory which is written to is copied before."""
    if not pairs:
        return
    if len(pairs) > 1:
        written = {maths.memory(x) for x, _ in pairs}
        pairs = [(x, y.clone() if not plain([y]) or maths.memory(y) in written else y) for x, y in pairs]
    for x, y in pairs:
        x.copy_(y)


def check_number(x: Any, subject: str, owner: str, p: Tensor) -> None:
    """Refuse a loaded counter that is not one number that can be read."""
    if isinstance(x, Tensor):
        good = x.numel() == 1 and not x.dim() and not x.is_complex() and (p.is_meta or not x.is_meta)
        found = f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype} on {x.device}"
    else:
        good, found = isinstance(x, numbers.Real) and not isinstance(x, bool), repr(x)
    if not good:
        raise ValueError(f"{subject} must be one real number, as {owner} needs it, but is {found}.")


def check_tensor(x: Any, new: Tensor | None, subject: str, where: str, owner: str, p: Tensor) -> None:
    """Refuse a loaded field that is not a tensor of the shape that it has here, or has no values."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{subject} {where} that is no tensor but {x!r}, but {owner} needs a tensor.")
    if new is None or x.shape != new.shape:
        raise ValueError(
            f"{subject} of shape {tuple(x.shape)} {where}, but {owner} needs "
            f"{'none' if new is None else tuple(new.shape)} for a parameter of shape {tuple(p.shape)}. Load a "
            "checkpoint of the same model, with its parameters in the same order."
        )
    if x.is_meta and not p.is_meta:
        raise ValueError(f"{subject} {where} on the meta device, where it has no values. Load it with them.")


def can_begin(transform: Transform) -> bool:
    """Whether the states of a transform can be made for a matrix that has no values."""
    try:
        for link in transform.links:
            fresh_state(link.transform, torch.empty(64, 64, device="meta"))
    except Exception:  # of a function of a user's, which may look at values
        return False
    return True


def scalars_of(transform: Transform) -> set[str]:
    """The names of the fields that hold one number per parameter."""
    return names_of(transform, operator.attrgetter("scalars"))


def encoded_in(transform: Transform) -> set[str]:
    """The names of the fields that have a dtype of their own."""
    return names_of(transform, operator.attrgetter("encoded"))


def names_of(transform: Transform, role: Callable[[Fields], tuple[bool, ...]]) -> set[str]:
    """The names of the fields that play a role."""
    return {
        name
        for link, keys in zip(transform.links, transform.plan.keys)
        for name, yes in zip(keys, role(fields_of(link.transform)))
        if yes
    }


def captures(p: Tensor) -> bool:
    """Whether a graph can capture what is done to this parameter."""
    return p.is_cuda


def capturing() -> bool:
    """Whether a graph is capturing now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def like_meta(p: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, and of no other type, without memory."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def unchanged(a: Any, b: Any) -> bool:
    """Whether a group's option is still what it was."""
    b = tuple(b) if type(b) is list else b
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b))


def refuse_disagreement(groups: list[Group]) -> None:
    """A transform that sees all groups together has one set of hyperparameters."""
    if len({len(g.plan.links) for g in groups}) > 1:
        raise ValueError("A transform that sees the parameters of all groups together needs the same maximize in all groups.")
    for k, link in enumerate(groups[0].plan.links):
        value = link.transform
        others = [g.plan.links[k].transform for g in groups[1:]]
        if value.declaration.whole and any([x != value for x in others]):
            names = [n for n, x in value.arguments.items() if any([not same(x, y.arguments[n]) for y in others])]
            raise ValueError(
                f"{value.declaration.name} sees the parameters of all groups together, so {' and '.join(names)} must be the "
                f"same in all groups, but there are {', '.join(map(repr, [value, *others]))}."
            )


def value_and_grad(
    given: list[Tensor], params: list[Tensor], grads: list[Tensor], value: Any, value_and_grad: Callable[[], Any]
) -> Any:
    """A closure as a function of the parameters, which it leaves where it was evaluated; at `given` its value is known."""

    def evaluate(at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if all(map(operator.is_, at, given)):
            return sharded.whole(torch.as_tensor(value).detach()), grads
        overwrite(params, at)
        with torch.enable_grad():
            loss = value_and_grad()
        overwrite(at, [p.detach() for p in params])  # a closure may have changed them, by clamping for instance
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if not plain(found, params):
            found = sharded.alike(found, params, (), "number {}".format)
        return sharded.whole(torch.as_tensor(loss).detach()), [g.to_dense() if g.is_sparse else g for g in found]

    return evaluate
