"""`Transform`: an optimizer as a value, and the pure functions of it.

Pytrees enter and leave here; what happens to the lists in between is `purestep._engine.run`'s. Transforms are declared with
`purestep.declare` and put together with `purestep.compose`.
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from purestep._core import maths, tree
from purestep._core.lists import pick, put
from purestep._core.masks import MaskCache, refuse_unmatched, refuse_unused, select
from purestep._core.plain import plain
from purestep._core.primitives import (
    Link,
    LinkDeclaration,
    Primitive,
    fields_of,
    fresh_state,
    fresh_whole_state,
    is_off,
    refuse_schedules,
    state_type,
)
from purestep._core.torch_api import is_batched, left_out_of_graphs, tree_leaves
from purestep._engine.boundary import (
    columns_of,
    distinct,
    kept_in_place,
    like_params,
    on_lists,
    pick_leaves,
    share,
    tree_of,
    trees_of,
    unshared,
)
from purestep._engine.checks import (
    check_extras,
    check_gradients,
    check_params,
    check_states,
    either,
    executor_of,
    flattened,
    refuse_flat,
    refuse_stacked,
    spread_alike,
)
from purestep._engine.explain import Explanation, watched
from purestep._engine.plan import ParamSlice, Plan, Structure, structure_of
from purestep._engine.run import Inputs, choose, run_chain
from purestep._engine.sparse import SparseRows
from purestep._engine.step_cache import repeatable
from purestep._engine.step_on_parts import on_parts, parts_of, remember
from purestep._executors.chains import detail
from purestep._executors.task import LEAF_BY_LEAF, WATCH, Env, ExecutorName, Ownership
from purestep._trace.program import program

PyTree = Any


class Transform:
    """An optimizer, or a part of one: a frozen value made of pure functions, and a pytree of its hyperparameters.

    Transforms are made by factories (`purestep.adamw`, `purestep.chain`, …), never by calling this class. They print as
    the call that makes them, compare by value, pickle, and can be vmapped over and differentiated with respect to.

    >>> import torch, purestep as ps
    >>> opt = ps.sgd(lr=0.1)
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> state = opt.init_state(params)
    >>> params, state = opt.step({"w": torch.tensor([1.0, 1.0])}, state, params)
    >>> params
    {'w': tensor([0.9000, 1.9000])}
    """

    __slots__ = ()
    links: tuple[Link, ...]
    """The transforms this one is made of, in order."""
    _plan: Plan | None
    _structure: Structure | None  # of a composite, from the beginning: `torch.compile` need not trace how a step is planned

    @property
    def plan(self) -> Plan:
        """What the engine knows of this transform before it sees a tensor."""
        if torch.compiler.is_compiling():
            known = self._structure
            return Plan(self.links, structure_of(self.links) if known is None else known)
        if self._plan is None:
            links = self.links
            object.__setattr__(self, "_plan", Plan(links, structure_of(links)))
        return self._plan  # type: ignore[return-value]

    # -- the three functions

    def init_state(self, params: PyTree) -> Any:
        """The state before the first update.

        Args:
            params: any pytree of floating-point or complex tensors. `None` is a leaf without a parameter.

        Returns:
            a `NamedTuple` (for a chain, a tuple of them) whose fields are pytrees of the structure of `params`.

        Raises:
            TypeError: a leaf is not a floating-point or complex tensor; the error names its path.
        """
        leaves, spec = tree.flatten(params)
        check_params(leaves, spec)
        states = []
        memo: MaskCache = {}
        for link in self.links:
            value = link.transform
            fields = fields_of(value)
            on = select(link.masks, leaves, spec, memo)
            for path, p, yes in zip(spec.paths(), leaves, on) if any(map(flattened, leaves)) else ():
                if yes:
                    refuse_flat(value, tree.quote(path), p)
            if value.declaration.whole:
                rows = [k for k, yes in enumerate(on) if yes]
                made = [
                    put([None] * len(leaves), rows, c) if leaf else c
                    for c, leaf in zip(fresh_whole_state(value, pick(leaves, rows)), fields.leaves)
                ]
                states.append(tree_of(link, state_type(value), fields, made, spec))
                continue
            if is_off(value):
                on = [False] * len(leaves)
            if value.declaration.requires is not None:
                for path, p, yes in zip(spec.paths(), leaves, on):
                    if yes:
                        value.declaration.requires(tree.quote(path), p)
            each = [fresh_state(value, p) if yes else (None,) * len(fields.names) for p, yes in zip(leaves, on)]
            columns: list[list[Any]] = [list(c) for c in zip(*each)] if each else [[] for _ in fields.names]
            for f, scalar in enumerate(fields.scalars):
                if scalar:
                    columns[f] = share(columns[f], leaves)
            states.append(tree_of(link, state_type(value), fields, columns, spec))
        masks = [m for link in self.links for m in link.masks]
        refuse_unused(masks, memo)
        if masks:
            refuse_unmatched(masks, spec.paths())
        return self._join(states)

    def update(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree,
        *,
        donate: bool = False,
        compile: bool = False,
        executor: ExecutorName | None = None,
        **extras: Any,
    ) -> tuple[Any, Any]:
        """The updates (add them to the parameters) and the new state. Changes nothing it is given.

        Args:
            grads: the gradients, a pytree of the structure of `params`. Where it holds `None`, the parameter and its state
                are left exactly as they are, and the update is `None`.
            state: what `init_state` or the last update returned.
            params: the parameters.
            donate: give the memory of `state` away: it is reused, and the old state must not be used again.
            compile: make one kernel of every run of elementwise transforms, with Inductor, at its first use in the process;
                it serves tensors of every shape. What is not elementwise runs as it would without, and so does a donated
                step for which torch has the very kernel. The same as ``executor="compiled"``. Inside `torch.func` and
                `torch.compile` it changes nothing.
            executor: how the leaf functions are run. By default the fastest way that fits; ``"leaf"`` runs them one
                parameter at a time, so that an error appears on its author's line; ``"foreach"`` runs all parameters at
                once; ``"fused"`` insists on one of torch's fused kernels, which only `step` can use.
            **extras: what some transforms ask for at each update, such as ``value_and_grad=``, a function from parameters to
                `(value, gradients)`, for `lbfgs`.

        Returns:
            ``(updates, state)``: the updates, a pytree of the structure of `params`, each in its parameter's shape and dtype,
            or `None` where the gradient is; and the new state.

        Raises:
            ValueError: the structure, shape, dtype or device of a gradient or state is not its parameter's; the error
                names the first path. There is no such executor.
            TypeError: the state belongs to another transform, a parameter cannot be optimized, or an extra argument is
                missing or unknown.
        """
        executor = executor_of(compile, executor)
        if executor == "fused":
            raise ValueError(
                "executor='fused' insists on one of torch's fused kernels, which write parameters: update makes updates alone. "
                "Use step(..., executor='fused'), or leave executor out."
            )
        return self._advance(grads, state, params, False, donate, executor, extras)

    def step(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree,
        *,
        donate: bool = False,
        compile: bool = False,
        executor: ExecutorName | None = None,
        **extras: Any,
    ) -> tuple[Any, Any]:
        """The new parameters and the new state: `update` and `apply_updates` at once.

        Args:
            grads: as in `update`.
            state: as in `update`.
            params: as in `update`.
            donate: give the memory of `state` and `params` away: both are overwritten, and neither must be used again.
            compile: as in `update`.
            executor: as in `update`.
            **extras: as in `update`.

        Returns:
            ``(params, state)``: the new parameters, a pytree of the structure of `params`, in its shapes and dtypes; and the
            new state.

        Raises:
            ValueError: as in `update`.
            TypeError: as in `update`.
        """
        return self._advance(grads, state, params, True, donate, executor_of(compile, executor), extras)

    def explain(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree,
        *,
        donate: bool = False,
        compile: bool = False,
        executor: ExecutorName | None = None,
        **extras: Any,
    ) -> Explanation:
        """How `step` would run on these arguments: which executor takes which parameters, and why those before it declined.

        A step is made on copies, so nothing of the arguments changes, but functions among them are called.

        Args:
            grads: the gradients, as for `step`; and so are all other arguments.
            state: the state.
            params: the parameters.
            donate: whether the memory of `state` and `params` would be given away.
            compile: whether Inductor would be asked for.
            executor: which executor would be asked for.
            **extras: what some transforms ask for at each update.

        Returns:
            a value that prints as a table: for each run of transforms the executor, how many parameters and elements, their
            dtype and device; then reasons, whether the step cache hits, and the memory that the step takes.

        Raises:
            ValueError, TypeError: as `step` does.

        >>> import torch, purestep as ps
        >>> opt, params = ps.adamw(1e-3), {"w": torch.ones(3, 2), "b": torch.ones(3)}
        >>> print(opt.explain(params, opt.init_state(params), params, donate=True))
        transforms                                                      executor  parameters  elements  dtype    device
        --------------------------------------------------------------  --------  ----------  --------  -------  ------
        scale_by_adam -> add_decayed_weights -> scale_by_learning_rate  fused     2           9         float32  cpu
        The step cache misses; the mode is 'program'.
        Beside temporaries it takes 0 bytes of new memory.
        """
        wanted = executor_of(compile, executor)
        leaves, spec = tree.flatten(params)
        columns = columns_of(self.plan, self._split(state), spec)
        everything = [*leaves, *tree.flatten_like(grads, spec, "grads"), *distinct(self.plan, columns)]
        guards = self.plan.guards_for(len(leaves), len(everything))
        if leaves and hasattr(leaves[0], "full_tensor"):
            repeated = repeatable(self.plan) if donate else None
            lists = everything[len(leaves) : 2 * len(leaves)], leaves
            parts = None if repeated is None else parts_of(repeated, lists, columns, guards)
            everything = [x for xs in parts or () for x in xs]
        cached = guards.last is not None and not maths.transforming() and guards.last.matches(everything)
        return watched(lambda g, s, p: self._advance(g, s, p, True, donate, wanted, extras), (grads, state, params), cached)

    def _advance(
        self,
        grads: PyTree,
        state: Any,
        params: PyTree,
        apply: bool,
        donate: bool,
        executor: ExecutorName | None,
        extras: dict[str, Any],
    ) -> tuple[Any, Any]:
        if torch.compiler.is_compiling() and any(map(is_unrolled, self.links)):
            return advance_eagerly(self, grads, state, params, apply, donate, executor, extras)
        plan = self.plan
        if extras or plan.extras:
            check_extras(plan, extras)
        leaves, spec = tree.flatten(params)
        gradients = tree.flatten_like(grads, spec, "grads")
        states = columns_of(plan, self._split(state), spec)
        eager = not (torch.compiler.is_compiling() or maths.transforming())
        everything = [*leaves, *gradients, *distinct(plan, states)] if eager else []  # which tensors are one is no constant
        remembers = eager and WATCH.decided is None  # `explain` leaves the step cache as it is
        guards = plan.guards_for(len(leaves), len(everything)) if remembers else None
        # guard hit: these tensors were checked before, and none of them requires grad
        known = None if guards is None else guards.check(everything)
        if known is not None and apply and donate and WATCH.decided is None:
            repeated = repeatable(plan)
            if repeated is not None and repeated.at_once((gradients, leaves), states, known.facts, executor):
                return params, state
        if guards is not None and apply and donate and leaves and hasattr(leaves[0], "full_tensor"):
            repeated = repeatable(plan)
            if repeated is not None and on_parts(repeated, (gradients, leaves), states, guards, executor):
                return params, state
        rows = None
        if known is None:
            check_params(leaves, spec)
            shapes = [p if p is None else p.shape for p in leaves]
            check_gradients(gradients, leaves, shapes, spec)
            if type(None) in set(map(type, gradients)):
                rows = [k for k, g in enumerate(gradients) if g is not None]
            check_states(plan.links, states, leaves, shapes, spec)
            if plan.structure.masked and any([p is not None and is_batched(p) for p in leaves]):
                refuse_stacked(plan, states, leaves, spec)
        usual = known is not None or (eager and plain(everything, optional=True))
        if not usual and (eager or not plain(leaves, gradients, optional=True)):
            gradients = spread_alike(gradients, leaves, plan.alike(states), spec, plan)
        chosen = states if rows is None else [pick_leaves(s, info, rows) for s, info in zip(states, plan.fields)]
        live, given = pick(gradients, rows), pick(leaves, rows)

        memo: MaskCache = {}

        def mask(masks: tuple[Any, ...]) -> list[bool]:
            return pick(select(masks, leaves, spec, memo), rows)

        for name in plan.trees:
            extras[name] = like_params(extras[name], name, plan, (leaves, rows, spec), mask)
        followed = [plan.tensors, *map(extras.__getitem__, plan.trees)]
        if known is None:
            followed += [live, given, *[c if isinstance(c, list) else tree_leaves(c) for s in chosen for c in s]]
        mode = choose(executor, *followed)
        before = list(map(list, states))
        groups = [ParamSlice(plan, range(len(given)))]
        touched = None
        if known is None and not all([g.layout is torch.strided for g in live]):
            touched = SparseRows(live, given, chosen, groups, mask, lambda k: pick(spec.paths(), rows)[k])
            live, given, chosen = touched.grads, touched.params, touched.states
        if "value_and_grad" in extras:
            extras["value_and_grad"] = on_lists(extras["value_and_grad"], leaves, rows, spec)
        inputs = Inputs(live, given, chosen, mask, extras)
        inputs.plain = usual
        if rows is not None:
            inputs.layout = lambda masks: [
                (p.numel() * (1 + p.is_complex()), g is not None)
                for p, g, yes in zip(leaves, gradients, select(masks, leaves, spec, memo))
                if yes
            ]
        if known is not None:
            inputs.facts = known.facts
        env = Env(mode, executor, Ownership(given=donate, counters=rows is None), live + given)
        out, news = run_chain(groups, inputs, env, apply)
        if touched is not None:
            out, news = touched.scatter(out, news, apply, env.own.given)
        elif guards is not None and known is None and usual and env.mode == "program" and only_tensors(everything):
            guards.install(everything)
        elif guards is not None and apply and donate and rows is None and hasattr(leaves[0], "full_tensor"):
            repeated = repeatable(plan)
            if repeated is not None and env.mode == "program":
                remember(repeated, (gradients, leaves), before, guards)
        if rows is not None:
            out = put(leaves if apply else [None] * len(leaves), rows, out)
            for olds, new, info in zip(states, news, plan.fields):
                for f, leaf in enumerate(info.leaves):
                    if leaf:
                        new[f] = put(olds[f], rows, new[f])
        if not donate and (env.mode == "program" or not maths.recorded(given)):
            views = executor in LEAF_BY_LEAF or any(map(Tensor.is_complex, given))
            out, news = unshared(out, news, (leaves, gradients, before), plan, views)
        elif donate and given and not given[0].is_cpu and env.mode == "program":
            kept_in_place(out, news, before, plan)
        identities = not torch.compiler.is_compiling()  # which knows none of lists (2.9)
        result = params if identities and out is leaves else tree.unflatten(out, spec)
        if donate and identities and all([all(map(operator.is_, new, old)) for new, old in zip(news, before)]):
            return result, state  # all of it was reused in place
        return result, self._join(trees_of(plan, news, spec))

    # -- the state of the whole, as a list with one entry per link

    def _split(self, state: Any) -> list[Any]:
        return [state]

    def _join(self, states: Sequence[Any]) -> Any:
        return states[0]

    # -- hyperparameters

    @property
    def hyperparams(self) -> dict[str, Any]:
        """The hyperparameters by name.

        A name that occurs twice in a chain is qualified by its place in it, ``"0.lr"``, in a partition by its label, and in a
        `named_chain` by its name there, ``"hidden.lr"``.

        >>> import purestep as ps
        >>> ps.chain(ps.scale(2.0), ps.trace(0.9), ps.scale(3.0)).hyperparams
        {'0.factor': 2.0, 'momentum': 0.9, 'dampening': 0.0, '2.factor': 3.0}
        """
        return {name: value for name, _, _, value in self._named(hypers=True)}

    @property
    def switches(self) -> dict[str, Any]:
        """The arguments that are not numbers, named as `hyperparams` are."""
        return {name: value for name, _, _, value in self._named(hypers=False)}

    def replace(self, **changes: Any) -> Self:
        """A new transform with these hyperparameters or switches; this one is untouched.

        >>> import purestep as ps
        >>> ps.sgd(lr=0.1).replace(lr=0.2).hyperparams["lr"]
        0.2
        >>> opt = ps.chain(ps.scale(2.0), ps.scale(3.0)).replace(**{"1.factor": 4.0})

        Args:
            **changes: the new values, by the names in `hyperparams` and `switches`. A name with a dot in it is given as
                ``**{"1.factor": 4.0}``.

        Raises:
            TypeError: there is no such name, or it is ambiguous; the error lists the names there are.
            ValueError: the value is outside the range of the hyperparameter.
        """
        return self._replace(changes, strict=True)

    def _replace(self, changes: dict[str, Any], strict: bool) -> Self:
        named = [*self._named(hypers=True), *self._named(hypers=False)]
        where = {name: (i, plain) for name, i, plain, _ in named}
        new = [dict(link.transform.arguments) for link in self.links]
        for name, value in changes.items():
            if name not in where:
                same = [n for n, _, plain, _ in named if plain == name]
                if same:
                    raise TypeError(f"{name!r} is ambiguous here: say which one, {either(same)}.")
                there = f"its names are {either(sorted(where))}" if where else "it has no arguments"
                raise TypeError(f"There is no {name!r} to replace in {self!r}; {there}.")
            i, plain = where[name]
            new[i][plain] = self.links[i].transform.declaration.checked(plain, value, strict)
        made = [type(link.transform)(link.transform.declaration, a) for link, a in zip(self.links, new)]
        return self._rebuild(iter(made))

    def _named(self, hypers: bool) -> list[tuple[str, int, str, Any]]:
        """(name, link, name within the link, value) of every hyperparameter, or every switch."""
        found = []
        for i, link in enumerate(self.links):
            d = link.transform.declaration
            found += [(n, i, link.transform.arguments[n]) for n in (d.hypers if hypers else d.switches)]
        routes = self._places()

        def qualified(name: str, i: int) -> str:
            alike = [j for n, j, _ in found if n == name]
            if len(alike) == 1:
                return name
            alone = routes[i] and len([j for j in alike if routes[j] == routes[i]]) == 1
            return ".".join([*([routes[i]] if routes[i] else []), *([] if alone else [str(i)]), name])

        return [(qualified(n, i), i, n, v) for n, i, v in found]

    def _weights(self) -> set[str]:
        """The names in `hyperparams` of those that are pytrees of tensors."""
        return {n for n, i, plain, _ in self._named(hypers=True) if plain in self.links[i].transform.declaration.arrays}

    def _places(self) -> list[str]:
        """Where each link is: the labels of partitions and the names of named chains around it, the outermost first."""
        return [""]

    def _rebuild(self, primitives: Any) -> Self:
        """The same structure around new primitives."""
        return next(primitives)

    # -- reading

    def program(self, *, donate: bool = False) -> str:
        """The source of the foreach program that `step` runs on matrices of real floating-point numbers, as text to read.

        On a CPU, lines that one of torch's fused kernels computes together are run as that.

        Args:
            donate: the program of a step with ``donate=True``, which overwrites the state and the parameters.

        Returns:
            the text of one Python function for each run of leafwise transforms, with a comment in the place of each `whole` or
            `nested` transform.

        >>> import purestep as ps
        >>> print(ps.sgd(lr=0.1).program(donate=True))
        def program(g, p, lr):
            axpy_(p, g, -lr)
            return p,
        <BLANKLINE>
        """
        return "\n".join(programs(self.plan, True, donate))


def is_unrolled(link: Link) -> bool:
    """Whether `torch.compile` leaves a step of this link out of its graph."""
    unrolls = link.transform.declaration.unrolls
    return unrolls is not None and unrolls(link.transform.arguments)


# A compiled while_loop would keep a loop of iterations one, but in torch 2.13 and 2.14 all that traced code assigns to an
# attribute behind such a loop is lost without a word: in the code around the step, too.
advance_eagerly = left_out_of_graphs(
    Transform._advance,
    reason="torch.compile would write out every iteration of this step, in minutes, and again when its history has grown; so "
    "the step runs outside of the graph. Compile the loss instead: opt.step(..., value_and_grad=torch.compile(value_and_grad))",
)


def only_tensors(values: list[Any]) -> bool:
    """Whether all of these are tensors."""
    return all([isinstance(x, Tensor) for x in values])


def programs(plan: Plan, apply: bool, donate: bool) -> list[str]:
    """The source of the program of each stage of a plan; of a whole transform, its name and those it is put around."""
    texts = []
    for stage, within in zip(plan.stages, plan.inner):
        if stage.whole:
            inner = programs(within, False, donate) if within else []
            texts += [f"# {plan.links[stage.start].transform!r}{', around:' if inner else ''}\n", *inner]
            if inner:
                texts.append("# and after it:\n")
        elif stage.positions or apply:
            values = [plan.links[i].transform for i in stage.positions]
            if any([v.declaration.arrays for v in values]):
                texts.append(f"# {' -> '.join([v.declaration.name for v in values])}, one parameter at a time\n")
                continue
            matrix = torch.empty(64, 64, device="meta")
            parts = tuple([detail(v, tuple([x is None for x in fresh_state(v, matrix)])) for v in values])
            last = apply and stage is plan.stages[-1]
            texts.append(program(parts, last, False, donate, *[v.declaration for v in values]).source)
    return texts


class Single(Primitive, Transform):
    """A transform that is its own only link."""

    __slots__ = ("_links", "_plan", "_structure")
    _links: tuple[Link, ...] | None

    def __init__(self, declaration: LinkDeclaration, arguments: Any) -> None:
        write = object.__setattr__
        write(self, "declaration", declaration)
        write(self, "arguments", arguments)
        write(self, "_links", None)
        write(self, "_plan", None)
        write(self, "_structure", None)
        if declaration.state is not None and declaration.fields.step < 0:
            refuse_schedules(self)

    @property
    def links(self) -> tuple[Link, ...]:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        """The only one: with a twin of this transform, for a plan that held the transform itself would be held by it."""
        if self._links is not None:
            return self._links
        made = (Link(type(self)(self.declaration, self.arguments)),)
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_links", made)
        return made


class Leafwise(Single):
    """A transform that treats each parameter on its own; declared with `leafwise`."""

    __slots__ = ()


class Whole(Single):
    """A transform that sees all parameters together; declared with `whole`."""

    __slots__ = ()


def apply_updates(params: PyTree, updates: PyTree) -> Any:
    """`params + updates`, leaf by leaf, in the parameters' dtypes; where the update is `None` the parameter stays.

    Args:
        params: the parameters, a pytree of tensors.
        updates: a pytree of the structure of `params`, whose tensors can be broadcast to its.

    Returns:
        a pytree of the structure of `params`, with new tensors in its dtypes; where an update is `None`, the tensor of
        `params` itself.

    Raises:
        ValueError: `updates` has another structure than `params`; the error names the first path.

    >>> import torch, purestep as ps
    >>> ps.apply_updates([torch.tensor(1.0), torch.tensor(2.0)], [torch.tensor(0.5), None])
    [tensor(1.5000), tensor(2.)]
    """
    leaves, spec = tree.flatten(params)
    given = tree.flatten_like(updates, spec, "updates")
    return tree.unflatten([p if u is None else (p + u).to(p.dtype) for p, u in zip(leaves, given)], spec)


def eval_params(state: Any, params: PyTree) -> Any:
    """The parameters to evaluate a model with, where an algorithm's state says what their average is; else `params`.

    A pure reader: nothing is switched or swapped. A parameter that was never updated is returned as it is. An optimizer of
    `purestep.optim` has a method of this name.

    Args:
        state: what `init_state` or the last update returned.
        params: the parameters.

    Returns:
        a pytree of the structure of `params`, in its shapes. Without an average it is `params` itself.

    Raises:
        TypeError: `state` is not the state of a transform.

    >>> import torch, purestep as ps
    >>> opt, p = ps.asgd(lr=0.1, lambd=0.0, t0=0), torch.tensor([0.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.ones(1), state, p)
    >>> p, ps.eval_params(state, p)
    (tensor([-0.3000]), tensor([-0.2500]))
    """
    if type(state) is tuple:  # of a chain
        return next((found for s in state if (found := eval_params(s, params)) is not params), params)
    if type(state) is dict:  # of a partition
        for s in state.values():
            params = eval_params(s, params)
        return params
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        raise TypeError(
            f"eval_params takes the state of a transform, which init_state makes, but got {type(state).__name__}. For an "
            "optimizer of purestep.optim call its method: optimizer.eval_params()."
        )
    state, leaves, spec = typing.cast("Any", state), *tree.flatten(params)
    if hasattr(state, "evaluated"):
        each = map(type(state)._make, zip(*[tree.flatten_like(c, spec, "state") for c in state]))
        found = [p if x.step is None else maths.where(x.step == 0, p, x.evaluated(p)) for p, x in zip(leaves, each)]
        return tree.unflatten(found, spec)
    if hasattr(state, "averaged"):  # a whole transform's
        averages = tree.flatten_like(state.averaged(), spec, "state")
        return tree.unflatten([p if a is None else a for p, a in zip(leaves, averages)], spec)
    return eval_params(state.inner, params) if hasattr(state, "inner") else params
