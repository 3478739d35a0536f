"""The stateful face: a real `torch.optim.Optimizer` around any transform.

`param_groups` and `state[p]` are kept exactly as torch keeps them and are the only truth: a step gathers lists from them,
hands them to the engine, and gives their memory away. A transform's state is spread over the parameters' state dicts under
its field names, so that checkpoints are torch's.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import chain as chained
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import _global_optimizer_post_hooks as GLOBAL_POST_HOOKS
from torch.optim.optimizer import _global_optimizer_pre_hooks as GLOBAL_PRE_HOOKS

from purestep.engine import (
    Call,
    Executor,
    Group,
    Link,
    Mode,
    Primitive,
    choose,
    evaluate_mask,
    fields_of,
    fresh_state,
    fresh_whole_state,
    is_off,
)
from purestep.transform import Transform, chain
from purestep.transforms.scale import maximize as ascend
from purestep.tree import Spec

F = TypeVar("F", bound=Callable[..., None])

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

SHARED: Any = "shared"
"""The key in `state` of what a whole transform keeps for all parameters together."""

FLAGS = ("foreach", "capturable", "differentiable", "fused")


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that runs any transform.

    Everything that works on torch's optimizers works on it: parameter groups, closures, hooks, state dicts, learning rate
    schedulers, gradient scalers. A group's options are the transform's hyperparameters, under the names that
    `transform.hyperparams` gives them. A transform that sees all parameters together sees those of all groups.

    Args:
        params: an iterable of tensors, of `(name, tensor)` pairs, or of dicts, each a parameter group with options of its
            own. Names are the paths that masks are asked with; without names a path is the parameter's number.
        transform: what to run.
        maximize: climb instead of descending.
        foreach: run all parameters at once (True) or one by one, with less memory (False). By default the fastest.
        capturable: keep every number on the parameters' device; purestep always does on accelerators.
        differentiable: let autograd run through the step.
        fused: insist on a fused kernel (True), or do without (False). By default one is used where it fits.

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

    def __init__(
        self,
        params: Params,
        transform: Transform,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if not isinstance(transform, Transform):
            raise TypeError(f"Optimizer takes a transform, such as purestep.adamw(lr=3e-4), but got {transform!r}.")
        if maximize:
            transform = chain(ascend(), transform)
        flags = {"foreach": foreach, "capturable": capturable, "differentiable": differentiable, "fused": fused}
        self._begin(params, transform, transform.hyperparams, flags)

    def _begin(self, params: Params, recipe: Any, options: Mapping[str, Any], flags: dict[str, Any]) -> None:
        """`recipe` is the transform, or the factory that makes it from a group's options."""
        if flags.get("fused") and flags.get("foreach"):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if flags.get("fused") and flags.get("differentiable"):
            raise RuntimeError("`fused` does not support `differentiable`")
        self._recipe, self._options = recipe, tuple(options)
        self._made: list[tuple[list[Any], Transform]] = []
        self._transform({**options, **flags})  # refuses bad values before anything is changed
        super().__init__(params, {**options, **flags})

    # -- groups

    def _transform(self, group: Mapping[str, Any]) -> Transform:
        """The transform with a group's options."""
        options = {name: group[name] for name in self._options}
        return self._recipe.replace(**options) if isinstance(self._recipe, Transform) else self._recipe(**options)

    def _transforms(self) -> list[Transform]:
        """Each group's transform; made anew only where an option has changed."""
        made = self._made
        if len(made) != len(self.param_groups):
            made[:] = [([], chain())] * len(self.param_groups)
        for i, group in enumerate(self.param_groups):
            options = [group[name] for name in self._options]
            old = made[i][0]
            if not (old and all(map(operator.is_, old, options))) and not (old and all(map(unchanged, old, options))):
                made[i] = (options, self._transform(group))
        return [t for _, t in made]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            self._transform({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._fill([p for p in group["params"] if p.requires_grad], self._transform(group))

    # -- state

    def _fill(self, params: list[Tensor], transform: Transform) -> None:
        """Give these parameters whatever of their state is missing; their counters begin as one tensor."""
        keys = transform.plan.keys
        counters: dict[Any, Tensor] = {}
        with torch.no_grad():
            for k, link in enumerate(transform.links):
                value, names = link.transform, keys[k]
                if is_off(value) or not names:
                    continue
                if value.declaration.whole:
                    self._fill_whole(value, names, params)
                    continue
                on = self._mask_all(link, params)
                for p, yes in zip(params, on):
                    state = self.state[p]
                    if not yes or all([name in state for name in names]):
                        continue
                    fields = fresh_state(value, p)
                    for name, scalar, x in zip(names, fields_of(value).scalars, fields):
                        if name not in state and x is not None:
                            state[name] = counters.setdefault((name, p.device), x) if scalar else x

    def _fill_whole(self, value: Primitive, names: tuple[str, ...], params: list[Tensor]) -> None:
        """The same for a whole transform: what is not any parameter's is kept under a key of its own."""
        for name, leaf, x in zip(names, fields_of(value).leaves, fresh_whole_state(value, params)):
            if not leaf:
                self.state[SHARED].setdefault(name, x)
                continue
            for p, y in zip(params, x):
                self.state[p].setdefault(name, y)

    def _paths(self) -> dict[Tensor, str]:
        paths: dict[Tensor, str] = {}
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                paths[p] = group["param_names"][i] if "param_names" in group else str(len(paths))
        return paths

    def _mask_all(self, link: Link, params: list[Tensor]) -> list[bool]:
        on = [True] * len(params)
        for mask in link.masks:
            on = [a and b for a, b in zip(on, self._mask(mask, params))]
        return on

    def _mask(self, mask: Any, params: list[Tensor]) -> list[bool]:
        """A mask on some of the parameters: a function, or bools by name or by number."""
        paths = self._paths()
        everything = list(paths)
        keys = tuple(paths.values())
        named = "param_names" in self.param_groups[0] or isinstance(mask, dict)
        spec = Spec(dict, keys, None) if named or callable(mask) else Spec(list, tuple(range(len(keys))), None)
        known = dict(zip(everything, evaluate_mask(mask, everything, spec)))
        return [known[p] for p in params]

    # -- the step

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """What torch wraps every `step` in: hooks, and a range in the profile. It costs nothing where there are neither."""
        watched = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
                or GLOBAL_PRE_HOOKS or GLOBAL_POST_HOOKS or _profiler_enabled()
            ):  # fmt: skip
                return watched(self, *args, **kwargs)
            out = func(self, *args, **kwargs)
            self._optimizer_step_code()
            return out

        return step

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(bool(self.defaults.get("differentiable")))
        try:
            groups = list(zip(self.param_groups, self._transforms()))
            if groups[0][1].plan.whole:
                self._advance(groups)
            else:
                for group in groups:
                    self._advance([group])
        finally:
            torch._C._set_grad_enabled(grad)
        return loss

    def _advance(self, groups: list[tuple[dict[str, Any], Transform]]) -> None:
        """One update of the parameters of these groups, which the transforms see together."""
        params: list[Tensor] = []
        grads: list[Any] = []
        together: list[Group] = []
        alone = True
        for group, transform in groups:
            own = group["params"]
            given = [p.grad for p in own]
            if type(None) in set(map(type, given)):
                alone = False
                own = [p for p, g in zip(own, given) if g is not None]
                given = [g for g in given if g is not None]
            together.append(Group(transform.plan, range(len(params), len(params) + len(own))))
            params += own
            grads += given
        if not params:
            return
        states = list(map(self.state.__getitem__, params))
        keys = together[0].plan.keys
        try:
            columns = self._gather(states, together, keys)
        except KeyError:
            for rows, (_, transform) in zip(together, groups):
                self._fill(params[rows.rows.start : rows.rows.stop], transform)
            columns = self._gather(states, together, keys)
        executor = executor_of(groups[0][0])
        seen: tuple[Any, ...] = ()
        if torch.is_grad_enabled():
            fields = [c if isinstance(c, list) else [c] for c in chained.from_iterable(columns)]
            seen = (params, grads, *fields, *[g.plan.tensors for g in together])
        mode: Mode = choose(executor, *seen)
        before = list(map(list, columns))
        if not all([g.layout is torch.strided for g in grads]):
            refuse_sparse(grads, params, self._paths())
        call = Call(
            grads, params, columns, lambda m: self._mask(m, params), mode,
            apply=True, donate=mode != "leaf", alone=alone, executor=executor,
        )  # fmt: skip
        out, after = call.run(together)
        if out is not params:
            moved = [(p, x) for p, x in zip(params, out) if p is not x]
            for p, x in moved:
                p.copy_(x)
        for names, olds, news in zip(keys, before, after):
            if not all(map(operator.is_, olds, news)):
                for name, new in zip(names, news):
                    if not isinstance(new, list):
                        self.state[SHARED][name] = new
                        continue
                    for state, x in zip(states, new):
                        if x is not None:
                            state[name] = x

    def _gather(self, states: list[dict[str, Any]], groups: list[Group], keys: list[tuple[str, ...]]) -> list[Any]:
        """The state of these parameters as the engine takes it: per link, per field, a list."""
        columns: list[Any] = []
        for k, names in enumerate(keys):
            link = groups[0].plan.links[k]
            if not names:
                columns.append([])
            elif link.transform.declaration.whole:
                own = self.state[SHARED]
                columns.append(
                    [[s[n] for s in states] if leaf else own[n] for n, leaf in zip(names, groups[0].plan.fields[k].leaves)]
                )
            elif any([g.plan.optional[k] for g in groups]):
                columns.append([[s.get(n) for s in states] for n in names])
            else:
                columns.append([[s[n] for s in states] for n in names])
        return columns

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch's: every parameter has its own counter in it, though they may share one while training."""
        packed = super().state_dict()
        seen: set[int] = set()
        state: dict[Any, Any] = {}
        for key, fields in packed["state"].items():
            own = dict(fields) if isinstance(fields, dict) else fields
            if isinstance(own, dict):
                for name, x in own.items():
                    if isinstance(x, Tensor) and x.dim() == 0:
                        if id(x) in seen:
                            own[name] = x.clone()
                        seen.add(id(x))
            state[key] = own
        packed["state"] = state
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, purestep's or torch's; see `torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: the groups or the shapes in it are not this optimizer's; nothing is changed then.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("param_groups", [])
        if len(saved) != len(self.param_groups):
            return  # torch says so
        for old, group, transform in zip(saved, self.param_groups, self._transforms()):
            names = group.get("param_names", old["params"])
            like = [
                (name, link.transform.declaration.name)
                for link, keys in zip(transform.links, transform.plan.keys)
                for name, yes in zip(keys, fields_of(link.transform).like)
                if yes
            ]
            for key, p, path in zip(old["params"], group["params"], names):
                state = state_dict["state"].get(key, {})
                for name, owner in like:
                    x = state.get(name)
                    if isinstance(x, Tensor) and x.shape != p.shape:
                        raise ValueError(
                            f"The loaded state has {name!r} of shape {tuple(x.shape)} for {path!r}, but {owner} needs the "
                            f"parameter's shape, {tuple(p.shape)}. Load a checkpoint of the same model, with its parameters "
                            "in the same order."
                        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recipe": self._recipe, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._made = []
        for group, transform in zip(self.param_groups, self._transforms()):
            self._share(group, transform)

    def _share(self, group: dict[str, Any], transform: Transform) -> None:
        """Let the parameters of a group that have made as many updates share their counters again."""
        names = {
            name
            for link, keys in zip(transform.links, transform.plan.keys)
            for name, scalar in zip(keys, fields_of(link.transform).scalars)
            if scalar
        }
        shared: dict[Any, Tensor] = {}
        for p in group["params"]:
            state = self.state.get(p, {})
            for name in names & state.keys():
                x = state[name]
                if not isinstance(x, Tensor):  # as torch saved it before 1.12
                    x = torch.tensor(float(x), dtype=torch.float32)
                state[name] = shared.setdefault((name, x.item(), x.dtype, x.device), x)


def over(factory: Callable[..., Transform]) -> Callable[[F], F]:
    """Make an `__init__` run a factory: its arguments are the factory's, with `params` before them and torch's flags after."""
    wanted = tuple(inspect.signature(factory).parameters)

    def decorate(init: F) -> F:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def begin(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            flags = {name: given[name] for name in FLAGS if name in given}
            self._begin(given["params"], factory, {name: given[name] for name in wanted if name in given}, flags)

        return begin  # type: ignore[return-value]

    return decorate


def unchanged(a: Any, b: Any) -> bool:
    """Whether a group's option is still what it was."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b))


def executor_of(flags: Mapping[str, Any]) -> Executor | None:
    """What torch's flags ask of the engine."""
    if flags.get("fused"):
        return "fused"
    if flags.get("foreach") is False and flags.get("fused") is None:
        return "leaf"
    return "foreach" if flags.get("foreach") or flags.get("fused") is False else None


def refuse_sparse(grads: list[Tensor], params: list[Tensor], paths: Mapping[Tensor, str]) -> None:
    """Sparse gradients need an algorithm of their own."""
    p = next(p for p, g in zip(params, grads) if g.layout is not torch.strided)
    raise RuntimeError(
        f"The gradient of {paths[p]!r} is sparse, and this optimizer needs dense gradients. Create the embedding with "
        "sparse=False, or make the gradient dense with .to_dense()."
    )
