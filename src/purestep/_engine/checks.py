"""What a step refuses: parameters, gradients, states and arguments that cannot be what they are given as."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import sharded, tree
from purestep._core.masks import select
from purestep._core.primitives import Link, Primitive, fields_of, is_off
from purestep._engine.plan import Plan
from purestep._engine.processes import check_meshes, must_see_whole
from purestep._executors.task import EXECUTOR_NAMES, ExecutorName

PyTree = Any


def executor_of(compile: bool, executor: ExecutorName | None) -> ExecutorName | None:
    """How the leaf functions are asked to be run."""
    if executor is not None and executor not in EXECUTOR_NAMES:
        raise ValueError(f"executor must be None or one of {either(EXECUTOR_NAMES)}, but is {executor!r}.")
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
            raise ValueError(f"grads must have None where params have None, but have a gradient at {tree.quote(path)}.")
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


def refuse_stacked(plan: Plan, states: list[Any], params: list[Any], spec: tree.Spec) -> None:
    """Under `torch.func.vmap`, refuse a state that `init_state` made for stacked parameters, outside of `vmap`.

    It is recognised by masks: the parameters that have a state are not those that a mask selects, but those that it selects
    when each has one dimension more.

    Raises:
        ValueError: it is such a state; the error names a path.
    """
    for link, columns, info in zip(plan.links, states, plan.fields):
        fields = [c for c, leaf in zip(columns, info.leaves) if leaf]
        if not link.masks or not fields or is_off(link.transform):
            continue
        has = [any([c[k] is not None for c in fields]) for k in range(len(params))]
        on = select(link.masks, params, spec)
        if has == on:
            continue
        try:
            stacked = select(link.masks, [p if p is None else p.unsqueeze(0) for p in params], spec)
        except ValueError:  # a rule says nothing of such a parameter
            continue
        for path, yes, was, would in zip(spec.paths(), on, has, stacked):
            if yes != was and was == would:
                raise ValueError(
                    f"{link.transform.declaration.name}: the state was made for stacked parameters. Its mask selects "
                    f"{tree.quote(path)} {'with' if was else 'without'} the dimension of the members, and "
                    f"{'not without' if was else 'not with'} it. Make the state of each member: "
                    "torch.func.vmap(opt.init_state, out_dims=purestep.out_dims(opt, members))(members)."
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
    if not must_see_whole(value, p):
        return
    raise TypeError(
        f"{d.name} must see {'all parameters' if d.whole else 'whole parameters'}, but {path} is a flat parameter of "
        "FullyShardedDataParallel, of which each process has a part and does not know which. Use "
        "torch.distributed.fsdp.fully_shard, whose parameters say how they are spread, or transforms that treat every element "
        "by itself; to clip, call the module's own clip_grad_norm_ before the step."
    )


def spread_alike(
    grads: list[Any], params: list[Any], columns: list[Any], spec: tree.Spec, plan: Plan | None = None
) -> list[Any]:
    """Gradients that are spread over processes as their parameters are; and refuse states that are not.

    With a `plan`, also refuse parameters of different processes where it must see all.
    """
    if plan is not None:
        check_meshes(plan, params, lambda k: spec.paths()[k])
    return sharded.alike(grads, params, columns, lambda k: tree.quote(spec.paths()[k]))


FROM_CLOSURE = ("value", "value_and_grad")


"""The extra arguments that an optimizer of `purestep.optim` takes from the closure."""


def check_extras(plan: Plan, extras: dict[str, Any]) -> None:
    """Refuse missing and unknown extra arguments, and a loss or a function that is none."""
    wanted = [(link.transform.declaration.name, name) for link in plan.links for name in link.transform.declaration.extras]
    trees = {link.transform.declaration.name: link.transform.declaration.trees for link in plan.links}
    unknown = sorted([name for name in extras if name not in plan.extras])
    for who, name in wanted:
        if name not in extras:
            other = f", and not {either(unknown)}" if unknown else ""
            how = "takes it from the closure, step(closure)" if name in FROM_CLOSURE else "cannot give it"
            raise TypeError(
                f"{who} needs {name}: give it to each update, step(grads, state, params, {name}=...){other}. An optimizer of "
                f"purestep.optim {how}."
            )
        if name in plan.trees and name not in trees[who]:
            other = next(x for x, names in trees.items() if name in names)
            raise TypeError(
                f"{name} must be one thing for all transforms, but for {who} it is any argument (purestep.Extra), and for "
                f"{other} a tree like params (purestep.ExtraTree). Give one of them another name."
            )
        if name == "value":
            check_value(extras[name], f"value, the loss for {who}")
        if name == "value_and_grad" and not callable(extras[name]):
            raise TypeError(
                f"value_and_grad, which {who} needs, must be a function from parameters to (value, gradients), but got "
                f"{tree.described(extras[name])}."
            )
    if unknown:
        known = ", ".join([f"{who} asks for {name!r}" for who, name in wanted]) or "no part of it asks for an extra argument"
        raise TypeError(f"This transform has no use for {either(unknown)}: {known}.")


def check_value(value: Any, subject: str) -> None:
    """Refuse a loss that is not one number."""
    if isinstance(value, Tensor) and value.dim():
        raise TypeError(
            f"{subject}, must be a number or a 0-d tensor, but is a tensor of shape {tuple(value.shape)}. Take its mean or "
            "sum; to train one model per value, vmap over the whole step."
        )
    if not isinstance(value, (Tensor, numbers.Real)):
        raise TypeError(f"{subject}, must be a number or a 0-d tensor, but is {value!r}.")


def either(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
