"""The stateful face: a real `torch.optim.Optimizer` around any transform.

`param_groups` and `state[p]` are kept exactly as torch keeps them and are the only truth: a step gathers lists from them,
hands them to the engine, and gives their memory away. A transform's state is spread over the parameters' state dicts under
its field names, so that checkpoints are torch's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import Tensor

from purestep.engine import (
    Call,
    Executor,
    Group,
    Link,
    Mode,
    choose,
    evaluate_mask,
    fields_of,
    fresh_state,
    hyper_tensors,
    is_off,
    state_type,
)
from purestep.transform import Transform, chain
from purestep.transforms.scale import maximize as ascend
from purestep.tree import Spec

F = TypeVar("F", bound=Callable[..., None])

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

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
            if len(old) != len(options) or not all(map(unchanged, old, options)):
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
        keys = keys_of(transform.links)
        counters: dict[Any, Tensor] = {}
        with torch.no_grad():
            for k, link in enumerate(transform.links):
                value, names = link.transform, keys[k]
                if value.declaration.whole or is_off(value) or not names:
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
        differentiable = bool(self.defaults.get("differentiable"))
        with torch.set_grad_enabled(differentiable):
            transforms = self._transforms()
            groups = list(zip(self.param_groups, transforms))
            if any([link.transform.declaration.whole for link in transforms[0].links]):
                self._advance(groups)
            else:
                for group in groups:
                    self._advance([group])
        return loss

    def _advance(self, groups: list[tuple[dict[str, Any], Transform]]) -> None:
        """One update of the parameters of these groups, which the transforms see together."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        together: list[Group] = []
        alone = True
        for group, transform in groups:
            start = len(params)
            for p in group["params"]:
                g = p.grad
                if g is None:
                    alone = False
                else:
                    params.append(p)
                    grads.append(g)
            together.append(Group(transform.links, range(start, len(params))))
        if not params:
            return
        states = [self.state[p] for p in params]
        links = together[0].links
        keys = keys_of(links)
        try:
            columns = self._gather(states, together, keys)
        except KeyError:
            for group, (_, transform) in zip(together, groups):
                self._fill(params[group.rows.start : group.rows.stop], transform)
            columns = self._gather(states, together, keys)
        flags = groups[0][0]
        executor = executor_of(flags)
        mode: Mode = choose(executor, params, grads, *[c for cs in columns for c in cs], hyper_tensors(links))
        before = [list(cs) for cs in columns]
        refuse_sparse(grads, params, self._paths)
        call = Call(
            grads, params, columns, lambda m: self._mask(m, params), mode,
            apply=True, donate=not torch.is_grad_enabled(), alone=alone, executor=executor,
        )  # fmt: skip
        out, after = call.run(together)
        if out is not params and mode == "leaf":
            for p, new in zip(params, out):
                p.copy_(new)
        elif out is not params:
            moved = [(p, x) for p, x in zip(params, out) if p is not x]
            if moved:
                torch._foreach_copy_([p for p, _ in moved], [x for _, x in moved])
        for names, olds, news in zip(keys, before, after):
            for name, old, new in zip(names, olds, news):
                if new is not old:
                    for state, x in zip(states, new):
                        if x is not None:
                            state[name] = x

    def _gather(self, states: list[dict[str, Any]], groups: list[Group], keys: list[tuple[str, ...]]) -> list[Any]:
        """The state of these parameters as the engine takes it: per link, per field, a list."""
        columns: list[Any] = []
        for k, link in enumerate(groups[0].links):
            if link.masks or len(groups) > 1:
                columns.append(
                    [
                        [s.get(name) if link.masks or is_off(g.links[k].transform) else s[name] for g in groups for s in states[g.rows.start : g.rows.stop]]
                        for name in keys[k]
                    ]
                )
            elif is_off(link.transform):
                columns.append([[None] * len(states) for _ in keys[k]])
            else:
                columns.append([[s[name] for s in states] for name in keys[k]])
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
                for link, keys in zip(transform.links, keys_of(transform.links))
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
            for link, keys in zip(transform.links, keys_of(transform.links))
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
    """Make `__init__` of a class run a factory: its arguments are the factory's, with `params` before and torch's flags after."""
    wanted = tuple(inspect.signature(factory).parameters)

    def decorate(init: F) -> F:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            flags = {name: given[name] for name in FLAGS if name in given}
            self._begin(given["params"], factory, {name: given[name] for name in wanted if name in given}, flags)

        return __init__  # type: ignore[return-value]

    return decorate


def unchanged(a: Any, b: Any) -> bool:
    """Whether a group's option is still what it was."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and type(a) is type(b) and bool(a == b))


@functools.lru_cache(maxsize=256)
def _keys(shape: tuple[tuple[bool, tuple[str, ...]], ...]) -> list[tuple[str, ...]]:
    counts: dict[str, int] = {}
    for _, names in shape:
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return [
        tuple([name if counts[name] == 1 or name == "step" else f"{i}.{name}" for name in names])
        for i, (_, names) in enumerate(shape)
    ]


def keys_of(links: tuple[Link, ...]) -> list[tuple[str, ...]]:
    """Per link, the keys of its fields in `state[p]`: qualified by the link's number where two links share a name.

    A parameter has one `step`: all links of a chain count the same updates.
    """
    return _keys(tuple([(link.transform.declaration.whole, fields_of(link.transform).names) for link in links]))


def executor_of(flags: Mapping[str, Any]) -> Executor | None:
    """What torch's flags ask of the engine."""
    if flags.get("fused"):
        return "fused"
    if flags.get("foreach") is False and flags.get("fused") is None:
        return "leaf"
    return "foreach" if flags.get("foreach") or flags.get("fused") is False else None


def refuse_sparse(grads: list[Tensor], params: list[Tensor], paths: Callable[[], dict[Tensor, str]]) -> None:
    """Sparse gradients need an algorithm of their own."""
    if all([g.layout is torch.strided for g in grads]):
        return
    p = next(p for p, g in zip(params, grads) if g.layout is not torch.strided)
    raise RuntimeError(
        f"The gradient of {paths()[p]!r} is sparse, and this optimizer needs dense gradients. Create the embedding with "
        "sparse=False, or make the gradient dense with .to_dense()."
    )
