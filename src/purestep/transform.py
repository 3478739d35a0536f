"""`Transform`: an optimizer as a value, and the two ways to declare one.

A *leafwise* transform treats each parameter on its own: a function of one tensor, written once, out of place. A *whole*
transform sees all parameters together. `chain` puts transforms one after the other. Pytrees enter and leave here, and only
here; what happens to the lists in between is `purestep._engine.run`'s.
"""

from __future__ import annotations

import numbers
import operator
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from typing_extensions import Self

from purestep._core import maths, sharded, tree
from purestep._core.lists import pick, put
from purestep._core.masks import Memo, Not, refuse_unmatched, refuse_unused, route, select
from purestep._core.plain import plain
from purestep._core.primitives import (
    Fields,
    Link,
    LinkDeclaration,
    Primitive,
    Sparse,
    fields_of,
    fresh_state,
    fresh_whole_state,
    is_off,
    state_type,
)
from purestep._core.torch_api import SequenceKey, is_batched, register_pytree_node, tree_leaves
from purestep._core.values import call_of, factory_of, show
from purestep._engine.explain import Explanation, watched
from purestep._engine.guards import GuardCache
from purestep._engine.nesting import Inner
from purestep._engine.plan import ParamSlice, Plan
from purestep._engine.run import Inputs, choose, run_chain
from purestep._engine.sparse import Touched
from purestep._engine.step_cache import repeatable
from purestep._executors.chains import detail
from purestep._executors.task import EXECUTOR_NAMES, WATCH, Env, ExecutorName, Ownership
from purestep._trace.program import program

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

PyTree = Any
Requires: TypeAlias = Callable[[str, Tensor], None] | None


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

    @property
    def plan(self) -> Plan:
        """What the engine knows of this transform before it sees a tensor."""
        if torch.compiler.is_compiling():
            return Plan(self.links)  # traced away; reading the cache would make its state a guard
        if self._plan is None:
            object.__setattr__(self, "_plan", Plan(self.links))
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
        memo: Memo = {}
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
        last = self.plan.guards_for(len(leaves), len(everything)).last
        cached = last is not None and not maths.transforming() and last.matches(everything)
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
        plan = self.plan
        if extras or plan.extras:
            check_extras(plan, extras)
        leaves, spec = tree.flatten(params)
        gradients = tree.flatten_like(grads, spec, "grads")
        states = columns_of(plan, self._split(state), spec)
        eager = not (torch.compiler.is_compiling() or maths.transforming())
        everything = [*leaves, *gradients, *distinct(plan, states)] if eager else []  # which tensors are one is no constant
        guards = plan.guards_for(len(leaves), len(everything)) if eager else GuardCache()
        known = guards.check(everything)  # guard hit: these tensors were checked before, and none of them requires grad
        if known is not None and apply and donate and WATCH.decided is None:
            repeated = repeatable(plan)
            if repeated is not None and repeated.at_once((gradients, leaves), states, known.facts, executor):
                return params, state
        rows = None
        if known is None:
            check_params(leaves, spec)
            shapes = [p if p is None else p.shape for p in leaves]
            check_gradients(gradients, leaves, shapes, spec)
            if type(None) in set(map(type, gradients)):
                rows = [k for k, g in enumerate(gradients) if g is not None]
            check_states(self.links, states, leaves, shapes, spec)
        usual = known is not None or (eager and plain(everything, optional=True))
        if not usual and (eager or not plain(leaves, gradients, optional=True)):
            gradients = spread_alike(gradients, leaves, plan.alike(states), spec)
        chosen = states if rows is None else [pick_leaves(s, info, rows) for s, info in zip(states, plan.fields)]
        live, given = pick(gradients, rows), pick(leaves, rows)

        memo: Memo = {}

        def mask(masks: tuple[Any, ...]) -> list[bool]:
            return pick(select(masks, leaves, spec, memo), rows)

        for name in plan.trees:
            extras[name] = like_params(extras[name], name, plan, leaves, rows, spec, mask)
        followed = [plan.tensors, *map(extras.__getitem__, plan.trees)]
        if known is None:
            followed += [live, given, *[c if isinstance(c, list) else tree_leaves(c) for s in chosen for c in s]]
        mode = choose(executor, *followed)
        before = list(map(list, states))
        groups = [ParamSlice(plan, range(len(given)))]
        touched = None
        if known is None and not all([g.layout is torch.strided for g in live]):
            touched = Touched(live, given, chosen, groups, mask, lambda k: pick(spec.paths(), rows)[k])
            live, given, chosen = touched.grads, touched.params, touched.states
        if "value_and_grad" in extras:
            extras["value_and_grad"] = on_lists(extras["value_and_grad"], leaves, rows, spec)
        inputs = Inputs(live, given, chosen, mask, extras)
        inputs.plain = usual
        if known is not None:
            inputs.facts = known.facts
        env = Env(mode, executor, Ownership(given=donate, counters=rows is None), live + given)
        out, news = run_chain(groups, inputs, env, apply)
        if touched is not None:
            out, news = touched.scatter(out, news, apply, env.own.given)
        elif known is None and usual and env.mode == "program" and all([isinstance(x, Tensor) for x in everything]):
            guards.install(everything)
        if rows is not None:
            out = put(leaves if apply else [None] * len(leaves), rows, out)
            for olds, new, info in zip(states, news, plan.fields):
                for f, leaf in enumerate(info.leaves):
                    if leaf:
                        new[f] = put(olds[f], rows, new[f])
        if not donate and (env.mode == "program" or not maths.recorded(given)):
            views = executor == "leaf" or any(map(Tensor.is_complex, given))
            out, news = unshared(out, news, leaves, gradients, before, plan, views)
        result = params if out is leaves else tree.unflatten(out, spec)
        if donate and all([all(map(operator.is_, new, old)) for new, old in zip(news, before)]):
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

        A name that occurs twice in a chain is qualified by its place in it, ``"0.lr"``, and in a partition by its label,
        ``"hidden.lr"``.

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
                    raise TypeError(f"{name!r} is ambiguous here: say which one, {_either(same)}.")
                raise TypeError(f"There is no {name!r} to replace in {self!r}; there is {_either(sorted(where)) or 'nothing'}.")
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
        routes = [route(link.masks) for link in self.links]

        def qualified(name: str, i: int) -> str:
            alike = [j for n, j, _ in found if n == name]
            if len(alike) == 1:
                return name
            alone = routes[i] and len([j for j in alike if routes[j] == routes[i]]) == 1
            return ".".join([*([routes[i]] if routes[i] else []), *([] if alone else [str(i)]), name])

        return [(qualified(n, i), i, n, v) for n, i, v in found]

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


def programs(plan: Plan, apply: bool, donate: bool) -> list[str]:
    """The source of the program of each stage of a plan; of a whole transform, its name and those it is put around."""
    texts = []
    for stage in plan.stages:
        if stage.whole:
            inner = programs(stage.inner, False, donate) if stage.inner else []
            texts += [f"# {plan.links[stage.start].transform!r}{', around:' if inner else ''}\n", *inner]
            if inner:
                texts.append("# and after it:\n")
        elif stage.positions or apply:
            values = [plan.links[i].transform for i in stage.positions]
            matrix = torch.empty(64, 64, device="meta")
            parts = tuple([detail(v, tuple([x is None for x in fresh_state(v, matrix)])) for v in values])
            last = apply and stage is plan.stages[-1]
            texts.append(program(parts, last, False, donate, *[v.declaration for v in values]).source)
    return texts


class Single(Primitive, Transform):
    """A transform that is its own only link."""

    __slots__ = ("_links", "_plan")
    _links: tuple[Link, ...] | None

    def __init__(self, declaration: LinkDeclaration, arguments: Any) -> None:
        super().__init__(declaration, arguments)
        object.__setattr__(self, "_links", None)
        object.__setattr__(self, "_plan", None)

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


class Composite(Transform):
    """A transform made of others, given by its children and by what is not a transform."""

    __slots__ = ("__weakref__", "_plan", "children", "context", "links")
    children: tuple[Transform, ...]
    context: tuple[Any, ...]
    freezes: Any = None
    """The mask of parameters that nothing else in the same chain acts on."""

    def __init__(self, children: Iterable[Transform], context: tuple[Any, ...] = ()) -> None:
        object.__setattr__(self, "children", tuple(children))
        object.__setattr__(self, "context", context)
        object.__setattr__(self, "links", self._links())
        object.__setattr__(self, "_plan", None)

    def _links(self) -> tuple[Link, ...]:
        return tuple([link for child in self.children for link in child.links])

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
            lambda children, context: _composite(cls, children, context),
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

    def _links(self) -> tuple[Link, ...]:
        own, inner = self.children
        return Link(own.links[0].transform, (), len(inner.links)), *inner.links

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


def _composite(cls: Any, children: Iterable[Any], context: Any) -> Any:
    """Put a composite together from what a pytree function left in its children's place, which may be anything."""
    children = tuple(children)
    if all([isinstance(c, Transform) for c in children]):
        return cls(children, context)
    made = object.__new__(cls)
    for name, x in (("children", children), ("context", context), ("links", ()), ("_plan", None)):
        object.__setattr__(made, name, x)
    return made


class Chain(Composite):
    """Transforms one after the other; made with `chain`."""

    __slots__ = ()

    def _links(self) -> tuple[Link, ...]:
        frozen = [Not(c.freezes) for c in self.children if isinstance(c, Composite) and c.freezes is not None]
        links = []
        for child in self.children:
            others = () if isinstance(child, Composite) and child.freezes is not None else frozen
            links += [link._replace(masks=(*link.masks, *others)) for link in child.links]
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


# ------------------------------------------------------------------------------------------------------------ declarations


@overload
def leafwise(
    state: type[S], *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Callable[[Callable[Concatenate[Tensor, S, Tensor, P], tuple[Tensor, S]]], Callable[P, Transform]]: ...
@overload
def leafwise(
    state: None = None, *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Callable[P, Transform]]: ...
def leafwise(
    state: Any = None, *, off: str | None = None, requires: Requires = None, sparse: Sparse = None, name: str = ""
) -> Any:
    """Declare a leafwise transform: a function of one parameter becomes a factory of transforms.

    The function takes the gradient (or the update so far) `g`, the parameter's state `s` and the parameter `p`, then the
    transform's arguments, and returns the new update and the new state. Without a state it takes `g` and `p` and returns
    the update. It is written out of place with operators and torch's functions; it must not branch on values (use
    `purestep.where`). Arguments annotated `Hyper` (or `float`) are hyperparameters, all others are switches. A tensor that it
    closes over is an input like any other: it is read at every step, and derivatives with respect to it are followed.

    Args:
        state: a `NamedTuple` with a classmethod `init(p, ...)`, which may ask for hyperparameters by name. A field
            annotated `Scalar` holds one number per parameter, and one called `step` counts the updates.
        off: a hyperparameter. Where it is the plain number 0, the transform does nothing and has no state.
        requires: a function `(path, param)` that raises an error for a parameter that cannot be treated. It is called
            when the state is made, before anything has changed.
        sparse: what a sparse gradient means: ``"rows"``, that only the rows it has are changed, by the same function on
            these rows; ``"dense"``, that all rows change, so it is made dense first. By default it is refused.
        name: what the transform is called where it is printed; by default the function's name.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init`; or, from the decorator, the function has an
            argument annotated `Extra` or `ExtraTree`.

    >>> import torch, purestep as ps
    >>> @ps.leafwise()
    ... def sign(g, p):
    ...     return torch.sign(g)
    >>> ps.chain(sign(), ps.scale(-0.1)).step(torch.tensor([3.0, -2.0]), (ps.EmptyState(),) * 2, torch.zeros(2))[0]
    tensor([-0.1000,  0.1000])
    """
    if state is not None and not (isinstance(state, type) and hasattr(state, "init") and hasattr(state, "_fields")):
        raise TypeError(
            f"leafwise takes a state (a NamedTuple with a classmethod init(p)) or nothing, but got {state!r}. "
            "For a transform without state write @leafwise()."
        )

    def declare(function: Any) -> Any:
        declaration = LinkDeclaration(function, state, off=off, requires=requires, sparse=sparse, name=name)
        if declaration.extras:
            raise TypeError(f"{declaration.name} is leafwise, so it cannot take extra arguments; declare it with whole().")
        return factory_of(declaration, Leafwise)

    return declare


def whole(
    state: Any = None, *, moves: bool = False, scales: bool = False, sparse: Sparse = None, elementwise: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Transform]]:
    """Declare a whole transform: a function of all parameters together becomes a factory of transforms.

    The function takes the list of gradients, its state and the list of parameters, `(gs, s, ps, ...)`, then the transform's
    arguments, and returns the list of updates and the new state. Parameters without a gradient are not among them.
    Hyperparameters arrive as numbers or 0-d tensors, schedules already called.

    Args:
        state: a `NamedTuple` with a classmethod `init(params)`, which is given the list of all parameters. A field annotated
            `list[Tensor]` has an entry per parameter, like the parameter (`list[Scalar]`: one number), any other is the
            transform's own; one called `step` counts the updates, which the function does itself.
            Without a state the function is handed an `EmptyState` to return.
        moves: the function returns new parameters instead of updates. What it gives is then kept to the last bit.
        scales: the function returns, instead of updates, the number that all gradients are to be multiplied by. What follows
            in a chain does that on its way.
        sparse: as in `leafwise`; with ``"rows"`` the function is given these rows alone.
        elementwise: promises that what becomes of an element depends on what else there is in its own place, and on numbers
            that are no tensor's, and so is right on any part of the parameters: that is what a process sees of FSDP1's.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init`.

    >>> import torch, purestep as ps
    >>> @ps.whole(scales=True)
    ... def normalize(gs, s, params):
    ...     return 1 / ps.global_norm(gs), s
    >>> opt, params = normalize(), [torch.zeros(1), torch.zeros(1)]
    >>> opt.update([torch.tensor([3.0]), torch.tensor([4.0])], opt.init_state(params), params)[0]
    [tensor([0.6000]), tensor([0.8000])]
    """
    if state is not None and not (isinstance(state, type) and hasattr(state, "init") and hasattr(state, "_fields")):
        raise TypeError(f"whole takes a state (a NamedTuple with a classmethod init(params)) or nothing, but got {state!r}.")

    def declare(function: Callable[..., Any]) -> Any:
        d = LinkDeclaration(
            function, state, whole=True, moves=moves, scales=scales, sparse=sparse, elementwise=elementwise
        )  # fmt: skip
        return factory_of(d, Whole)

    return declare


def nested(
    state: Any,
    *,
    moves: bool = False,
    passes: bool = False,
    sparse: Sparse = None,
    elementwise: bool = False,
    name: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a transform that is put around another, and decides what becomes of its updates and its state.

    The function is that of a `whole` transform, with one more argument, annotated `Inner`: the other transform. Its
    `update(gs, state, params)` and `step` take and return lists, and its `when(flag, gs, state, params)` is an update where
    the flag holds, and otherwise none. Its state is the last field of the own state, and called ``inner``.

    Hyperparameters, masks, extra arguments, parameter groups and state dicts of the inner transform are seen to: they are
    those of the whole. Under `purestep.optim.Optimizer` its state is found under its usual names.

    Args:
        state: a `NamedTuple` with a classmethod `init(params, inner)`, which is given the list of all parameters, and what to
            pass on to its last field, `inner`. For the other fields see `whole`.
        moves: the function returns new parameters instead of updates. What it gives is then kept to the last bit.
        passes: promises that the function does nothing with the updates of the inner transform but return them. At the end of
            a chain the inner transform then applies them itself, with a fused kernel if there is one for it.
        sparse: as in `leafwise`.
        elementwise: as in `whole`, as far as the inner transform is.
        name: what the transform is called where it is printed; by default the function's name.

    Returns:
        a decorator that turns the function into a factory of transforms, which takes the function's arguments behind the
        first three, the other transform among them.

    Raises:
        TypeError: `state` is not a `NamedTuple` with a classmethod `init` and a last field `inner`; or, from the decorator, no
            argument is annotated `Inner`.

    >>> import torch, purestep as ps
    >>> from typing import Any, NamedTuple
    >>> class HalvedState(NamedTuple):
    ...     inner: Any
    ...
    ...     @classmethod
    ...     def init(cls, params, inner):
    ...         return cls(inner)
    >>> @ps.nested(HalvedState)
    ... def halved(gs, s, params, transform: ps.Inner):
    ...     us, inner = transform.update(gs, s.inner, params)
    ...     return [u / 2 for u in us], HalvedState(inner)
    >>> opt, p = halved(ps.sgd(lr=0.1)), torch.tensor([1.0])
    >>> opt.step(torch.tensor([1.0]), opt.init_state(p), p)[0]
    tensor([0.9500])
    """
    if not (isinstance(state, type) and hasattr(state, "init") and getattr(state, "_fields", ("",))[-1] == "inner"):
        raise TypeError(
            "nested takes a state, a NamedTuple with a classmethod init(params, inner) and 'inner' as its last field, but got "
            f"{state!r}."
        )

    def declare(function: Callable[..., Any]) -> Any:
        d = LinkDeclaration(
            function, state, whole=True, moves=moves, sparse=sparse, name=name, inner=Inner, passes=passes,
            elementwise=elementwise,
        )  # fmt: skip
        if not d.inner:
            raise TypeError(f"{d.name} takes no transform: annotate the argument that is one with purestep.Inner.")
        parameters = d.signature.parameters.values()
        d.signature = d.signature.replace(
            parameters=[p.replace(annotation=Transform) if p.name == d.inner else p for p in parameters]
        )

        def make(declaration: LinkDeclaration, arguments: dict[str, Any]) -> Nested:
            inner = arguments.pop(d.inner)
            if not isinstance(inner, Transform):
                hint = f" Did you mean to call it: {inner.__name__}(...)?" if hasattr(inner, "declaration") else ""
                raise TypeError(f"{d.name} is put around a transform, but {d.inner} is {inner!r}.{hint}")
            return Nested((Whole(declaration, arguments), inner))

        return factory_of(d, make)

    return declare


def columns_of(plan: Plan, states: Sequence[Any], spec: tree.Spec) -> list[list[Any]]:
    """The states of a plan's transforms, with lists for what they keep per parameter.

    Raises:
        TypeError: a state is that of another transform.
    """
    found: list[list[Any]] = []
    for link, expected, info, state in zip(plan.links, plan.types, plan.fields, states):
        if type(state) is not expected:
            raise TypeError(
                f"{link.transform.declaration.name} needs its own state, {expected.__name__}, but got {type(state).__name__}. "
                "A state belongs to the transform whose init_state made it."
            )
        own: list[Any] = []
        for c, name, leaf in zip(state, info.names, info.leaves):
            own.append(tree.flatten_like(c, spec, f"{expected.__name__}.{name}") if leaf else c)
        found.append(own)
    return found


def trees_of(plan: Plan, states: Sequence[Any], spec: tree.Spec) -> list[Any]:
    """`columns_of` undone: the states with trees again."""
    return [tree_of(*given, spec) for given in zip(plan.links, plan.types, plan.fields, states)]


def tree_of(link: Link, kind: Any, info: Fields, columns: Sequence[Any], spec: tree.Spec) -> Any:
    """The state of one transform, of the type `kind`, with trees in place of lists."""
    own: list[Any] = []
    for c, leaf in zip(columns, info.leaves):
        own.append(tree.unflatten(c, spec) if leaf else c)
    return kind(*own, None) if link.transform.declaration.inner else kind(*own)


def unshared(
    out: list[Any], news: list[Any], leaves: list[Any], gradients: list[Any], states: list[Any], plan: Plan, views: bool
) -> tuple[list[Any], list[Any]]:
    """The results of a pure update, with copies of those that are its inputs: results may be given away, inputs were not.

    What is one tensor in several places, as counters are, is one copy. A field that holds anything but tensors is never
    overwritten, and stays.
    """
    lists: list[tuple[Any, Any, bool]] = []
    for own, olds, info in zip(news, states, plan.fields):
        lists += zip(own, olds, info.leaves)
    if torch.compiler.is_compiling():  # which has no identities; the same list is compared place by place
        made = [copied(new, old, leaves, gradients) if leaf else new for new, old, leaf in lists]
        out = copied(out, leaves, gradients)
    else:
        mark = maths.memory if views else id  # results may be views of inputs, or not
        held = set(map(mark, leaves)) | set(map(mark, gradients))
        for _, old, leaf in lists:
            held.update(map(mark, old) if leaf else (mark(old),))
        held.discard(mark(None))
        copies: dict[int, Any] = {}

        def copy(x: Any) -> Any:
            if mark(x) not in held or not isinstance(x, Tensor):
                return x
            if id(x) not in copies:
                copies[id(x)] = x.clone()
            return copies[id(x)]

        made = [
            ([*map(copy, new)] if not held.isdisjoint(map(mark, new)) else new) if leaf else copy(new) for new, _, leaf in lists
        ]
        out = out if held.isdisjoint(map(mark, out)) else [*map(copy, out)]
    found = iter(made)
    return out, [[next(found) for _ in own] for own in news]


def copied(new: list[Any], *olds: list[Any]) -> list[Any]:
    """A list with copies of those tensors that one of the others has in the same place; the same copy for the same tensor."""
    if not any([x is old[k] for old in olds for k, x in enumerate(new)]):
        return new
    originals: list[Any] = []
    copies: list[Any] = []
    result: list[Any] = []
    for k, x in enumerate(new):
        if x is None or not any([x is old[k] for old in olds]):
            result.append(x)
            continue
        place = next((j for j, y in enumerate(originals) if y is x), None) if originals and originals[0] is x else None
        if place is None:
            originals.append(x)
            copies.append(x.clone())
            place = len(copies) - 1
        result.append(copies[place])
    return result


def pick_leaves(state: list[Any], info: Fields, rows: list[int]) -> list[Any]:
    """The fields of a state for some of the parameters."""
    return [pick(c, rows) if leaf else c for c, leaf in zip(state, info.leaves)]


# ---------------------------------------------------------------------------------------------------------------- checks


def share(column: list[Any], params: list[Any]) -> list[Any]:
    """One counter for all parameters on a device, instead of one each: they begin equal."""
    shared: dict[Any, Any] = {}
    result = []
    for x, p in zip(column, params):
        if x is None or is_batched(x):
            result.append(x)
        else:
            result.append(shared.setdefault((p.device, x.dtype), x))
    return result


def distinct(plan: Plan, states: list[Any]) -> list[Any]:
    """All that is in these states, of links that do something; counters, which parameters share, once each."""
    found: list[Any] = []
    counters: dict[int, Any] = {}
    for s, info, off in zip(states, plan.fields, plan.off):
        for c, leaf, scalar in zip(s, info.leaves, info.scalars):
            if off:
                continue
            if leaf and scalar:
                counters.update(zip(map(id, c), c))
            else:
                found += [x for x in c if x is not None] if leaf else [c]
    return found + [x for x in counters.values() if x is not None]


def executor_of(compile: bool, executor: ExecutorName | None) -> ExecutorName | None:
    """How the leaf functions are asked to be run."""
    if executor is not None and executor not in EXECUTOR_NAMES:
        raise ValueError(f"executor must be None or one of {_either(EXECUTOR_NAMES)}, but is {executor!r}.")
    if not compile:
        return executor
    if executor not in (None, "compiled"):
        raise ValueError(f"compile=True asks for one way to run, and executor={executor!r} for another; give one of them.")
    return "compiled"


def check_params(leaves: list[Any], spec: tree.Spec) -> None:
    """Refuse parameters that are not floating-point or complex tensors."""
    if all([isinstance(p, Tensor) for p in leaves]) and all(
        [d.is_floating_point or d.is_complex for d in {p.dtype for p in leaves}]
    ):
        return
    for path, p in zip(spec.paths(), leaves):
        if p is not None and not isinstance(p, Tensor):
            raise TypeError(f"Parameters must be tensors, but {tree.quote(path)} is a {type(p).__name__}: {p!r}.")
        if p is not None and not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"Only floating-point and complex parameters can be optimized, but {tree.quote(path)} is {p.dtype}. Leave it "
                "out of params (for a module: it is a buffer, not a parameter)."
            )


def check_gradients(grads: list[Any], params: list[Any], shapes: list[Any], spec: tree.Spec) -> None:
    """Refuse gradients whose shape, dtype or device is not their parameter's."""
    if type(None) not in set(map(type, grads)):
        try:
            if (
                [g.shape for g in grads] == shapes
                and [g.dtype for g in grads] == [p.dtype for p in params]
                and (
                    [g.is_cpu for g in grads] == [p.is_cpu for p in params] == [True] * len(grads)
                    or devices(grads) == devices(params)
                )
            ):
                return
        except AttributeError:
            pass  # a leaf that is no tensor: named below
    for path, g, p in zip(spec.paths(), grads, params):
        if g is None:
            continue
        if p is None:
            raise ValueError(f"grads have a gradient at {tree.quote(path)}, where params have None.")
        if not isinstance(g, Tensor):
            raise TypeError(f"Gradients must be tensors or None, but {tree.quote(path)} is a {type(g).__name__}: {g!r}.")
        check_like(g, p, f"The gradient of {tree.quote(path)}")


def check_like(x: Tensor, p: Tensor, subject: str) -> None:
    """Refuse a tensor whose shape, dtype or device is not the parameter's."""
    for what in ("shape", "dtype", "device"):
        of_x, of_p = getattr(x, what), getattr(p, what)
        if of_x != of_p:
            of_x, of_p = (tuple(of_x), tuple(of_p)) if what == "shape" else (of_x, of_p)
            raise ValueError(f"{subject} has {what} {of_x}, but the parameter has {what} {of_p}.")


def devices(tensors: list[Any]) -> list[torch.device]:
    return [x.device for x in tensors]


def check_states(links: Sequence[Link], states: list[Any], params: list[Any], shapes: list[Any], spec: tree.Spec) -> None:
    """Refuse a state that was made for other parameters: a kernel would read beyond its end."""
    for link, columns in zip(links, states):
        if link.transform.declaration.whole or link.transform.declaration.state is None:
            continue
        fields = fields_of(link.transform)
        for name, like, column in zip(fields.names, fields.like, columns):
            if not like or [x if x is None else x.shape for x in column] == shapes:
                continue
            for path, x, p in zip(spec.paths(), column, params):
                if x is not None and p is not None and x.shape != p.shape:
                    raise ValueError(
                        f"{link.transform.declaration.name}: the state's {name!r} at {tree.quote(path)} has shape "
                        f"{tuple(x.shape)}, but the parameter has shape {tuple(p.shape)}. Make a new state with init_state."
                    )


def flattened(p: Any) -> bool:
    """Whether this is the part that a process has of one of FSDP1's flat parameters."""
    return getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)


def refuse_flat(value: Primitive, path: str, p: Tensor) -> None:
    """Refuse a transform that must see whole parameters where it would see a part of them as if it were all.

    Raises:
        TypeError: the parameter is one of FSDP1's flat ones (`torch.distributed.fsdp.FullyShardedDataParallel`).
    """
    d = value.declaration
    if is_off(value) or d.elementwise:
        return
    if not d.whole:
        state = fresh_state(value, torch.empty(p.shape, dtype=p.dtype, device="meta"))
        part = detail(value, tuple([x is None for x in state]))
        if program((part,), False, False, False, d, form="single").elementwise:
            return
    raise TypeError(
        f"{d.name} must see {'all parameters' if d.whole else 'whole parameters'}, but {path} is a flat parameter of "
        "FullyShardedDataParallel, of which each process has a part and does not know which. Use "
        "torch.distributed.fsdp.fully_shard, whose parameters say how they are spread, or transforms that treat every element "
        "by itself; to clip, call the module's own clip_grad_norm_ before the step."
    )


def spread_alike(grads: list[Any], params: list[Any], columns: list[Any], spec: tree.Spec) -> list[Any]:
    """Gradients that are spread over processes as their parameters are; and refuse states that are not."""
    return sharded.alike(grads, params, columns, lambda k: tree.quote(spec.paths()[k]))


FROM_CLOSURE = ("value", "value_and_grad")
"""The extra arguments that an optimizer of `purestep.optim` takes from the closure."""


def check_extras(plan: Plan, extras: dict[str, Any]) -> None:
    """Refuse missing and unknown extra arguments, and a loss or a function that is none."""
    wanted = [(link.transform.declaration.name, name) for link in plan.links for name in link.transform.declaration.extras]
    trees = {link.transform.declaration.name: link.transform.declaration.trees for link in plan.links}
    unknown = sorted(extras.keys() - plan.extras)
    for who, name in wanted:
        if name not in extras:
            other = f", and not {_either(unknown)}" if unknown else ""
            how = "takes it from the closure, step(closure)" if name in FROM_CLOSURE else "cannot give it"
            raise TypeError(
                f"{who} needs {name}: give it to each update, step(grads, state, params, {name}=...){other}. An optimizer of "
                f"purestep.optim {how}."
            )
        if name in plan.trees and name not in trees[who]:
            other = next(x for x, names in trees.items() if name in names)
            raise TypeError(f"{name} is anything for {who}, but a tree for {other}: they do not go together.")
        if name == "value":
            check_value(extras[name], f"value, the loss for {who}")
        if name == "value_and_grad" and not callable(extras[name]):
            raise TypeError(
                f"value_and_grad, which {who} needs, must be a function from parameters to (value, gradients), but got "
                f"{extras[name]!r}."
            )
    if unknown:
        known = ", ".join([f"{who} asks for {name!r}" for who, name in wanted]) or "no part of it asks for an extra argument"
        raise TypeError(f"This transform has no use for {_either(unknown)}: {known}.")


def check_value(value: Any, subject: str) -> None:
    """Refuse a loss that is not one number."""
    if isinstance(value, Tensor) and value.dim():
        raise TypeError(
            f"{subject}, must be a number or a 0-d tensor, but is a tensor of shape {tuple(value.shape)}. Take its mean or "
            "sum; to train one model per value, vmap over the whole step."
        )
    if not isinstance(value, (Tensor, numbers.Real)):
        raise TypeError(f"{subject}, must be a number or a 0-d tensor, but is {value!r}.")


def like_params(
    given: PyTree,
    name: str,
    plan: Plan,
    leaves: list[Any],
    rows: list[int] | None,
    spec: tree.Spec,
    mask: Callable[[tuple[Any, ...]], list[bool]],
) -> list[Any]:
    """An extra argument that is a tree, as the list of the parameters that have a gradient; None where no one looks at it."""
    found, params, paths = [pick(xs, rows) for xs in (tree.flatten_like(given, spec, name), leaves, spec.paths())]
    needed: list[Any] = [None] * len(found)
    for link in plan.links:
        d = link.transform.declaration
        for k, yes in enumerate(mask(link.masks) if name in d.trees else ()):
            if yes and not isinstance(found[k], Tensor):
                raise TypeError(f"{d.name} needs {name} for every gradient, but at {tree.quote(paths[k])} it is {found[k]!r}.")
            if yes:
                check_like(found[k], params[k], f"{name} at {tree.quote(paths[k])}")
                needed[k] = found[k]
    return needed


def on_lists(function: Callable[[PyTree], Any], leaves: list[Any], rows: list[int] | None, spec: tree.Spec) -> Any:
    """`value_and_grad` as a function of the list of the parameters that have a gradient; the others are held fixed."""

    def listed(params: list[Tensor]) -> tuple[Any, list[Any]]:
        whole = params if rows is None else put(leaves, rows, params)
        result = function(tree.unflatten(whole, spec))
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor) or result[0].dim():
            raise TypeError(
                f"value_and_grad must return (value, gradients), the value a 0-d tensor, but it returned {result!r}. "
                "torch.func.grad_and_value returns them the other way around: lambda p: grad_and_value(loss)(p)[::-1]."
            )
        found = tree.flatten_like(result[1], spec, "the gradients of value_and_grad")
        check_gradients(found, leaves, [p if p is None else p.shape for p in leaves], spec)
        if not plain(leaves, found, optional=True):
            found = spread_alike(found, leaves, [], spec)
        for k in range(len(leaves)) if rows is None else rows:
            if found[k] is None:
                raise ValueError(f"value_and_grad gives no gradient at {tree.quote(spec.paths()[k])}, where grads have one.")
        return sharded.whole(result[0]), pick(found, rows)

    return listed


def _either(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


# --------------------------------------------------------------------------------------------------------- free functions


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
