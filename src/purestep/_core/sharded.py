"""Tensors that are spread over several processes: torch's `DTensor`.

What is elementwise is right on each process's part by itself, because gradient, parameter and state are spread alike. What
is not is computed on whole tensors, by every process, and each keeps its part; and of a number for each tensor (a norm, a
sum) the processes add up what they have. All processes run the same steps on the same list of tensors, so that they
communicate in the same order, and what cannot be right is refused before the first of them does.

A number for each tensor is always a plain tensor of shape (), the same in all processes.

Nothing is imported for it: whoever has such a tensor has imported the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core.exchange import block_at, part
from purestep._core.plain import bare


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a `DTensor`."""
    return isinstance(x, Tensor) and hasattr(x, "full_tensor")


def local(x: Any) -> Any:
    """This process's part of a sharded tensor; anything else as it is."""
    if not is_sharded(x):
        return x
    part: Any = x.to_local()
    return part.wait() if hasattr(part, "wait") else part  # it may be on its way yet


def whole(x: Any) -> Any:
    """A sharded tensor in one piece, which must not be written to; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def spread(x: Tensor, like: Any) -> Any:
    """`whole` undone: a tensor that every process has, spread as this one is."""
    if not is_sharded(like):
        return x
    return everywhere(x, like).redistribute(placements=like.placements)


def everywhere(x: Tensor, like: Any) -> Any:
    """A tensor that every process has, as one that goes with a sharded one, also where derivatives are recorded."""
    if not is_sharded(like):
        return x
    replicate = torch.distributed.tensor.Replicate()  # pyright: ignore[reportAttributeAccessIssue]
    return type(like).from_local(x, like.device_mesh, [replicate] * like.device_mesh.ndim, run_check=False)


def wrapped(x: Tensor, like: Any) -> Any:
    """`local` undone: a part as that of a tensor that is spread as this one is."""
    if not is_sharded(like):
        return x
    if not (x.requires_grad or torch.compiler.is_compiling()):
        if x.storage_offset():  # torch can neither save nor copy a sharded tensor whose part begins behind others
            x = x.clone()
        if x.dtype == like.dtype:
            return type(like)(x, like._spec, requires_grad=False)  # in a tenth of the time
    return type(like).from_local(
        x, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )  # fmt: skip


def spread_by_rows(x: Any, like: Any) -> Any:
    """A tensor of another shape than a parameter's, which every process has, spread over the processes that share this one.

    So what belongs to a parameter, such as a matrix for its rows, takes no more memory than its share. Numbers, empty tensors
    and what is spread already stay as they are.
    """
    if not isinstance(x, Tensor) or not x.dim() or not x.numel() or not any([p.is_shard() for p in like.placements]):
        return x
    given: Any = x
    if is_sharded(x) and any([p.is_shard() for p in given.placements]):
        return x
    distributed: Any = torch.distributed.tensor  # pyright: ignore[reportAttributeAccessIssue]
    placements = [distributed.Shard(0) if p.is_shard() else distributed.Replicate() for p in like.placements]
    mine, coordinate = local(x).new_empty(0), like.device_mesh.get_coordinate()
    if coordinate is not None:  # else this process has no part in it
        mine = part(local(x), block_at(coordinate, like.device_mesh.shape, placements, x.shape)).clone()
    return type(like).from_local(mine, like.device_mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def summed(values: Sequence[Tensor], of: Sequence[Any]) -> list[Tensor]:
    """Numbers that belong to tensors, each the sum of what the processes have found in their parts: one message for all of
    them. `values` are plain tensors of shape () on the devices of the parts, and whole already for what is not sharded."""
    found = list(values)
    together: dict[Any, list[int]] = {}
    for k, x in enumerate(of):
        if is_sharded(x):
            dims = tuple([i for i, placement in enumerate(x.placements) if not placement.is_replicate()])
            if dims:
                together.setdefault((x.device_mesh, dims, values[k].dtype), []).append(k)
    for (mesh, dims, _), rows in together.items():
        vector = torch.stack([found[k] for k in rows])
        everyone = len(dims) == mesh.ndim and mesh.size() == torch.distributed.get_world_size()
        for group in [torch.distributed.group.WORLD] if everyone else [mesh.get_group(dim) for dim in dims]:
            torch.distributed.all_reduce(vector, group=group)
        for k, x in zip(rows, vector.unbind()):
            found[k] = x
    return found


def sums(tensors: Sequence[Any], each: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The sum over all elements of each tensor, where `each` gives it of a plain tensor (or one of another type)."""
    given = [whole(x) if partial(x) else x for x in tensors]
    return summed([bare(each(local(x))) for x in given], given)


def partial(x: Any) -> bool:
    """Whether the processes have terms of a sum (or of another reduction), instead of parts."""
    return is_sharded(x) and any([placement.is_partial() for placement in x.placements])


class Measured:
    """What stands for a sharded tensor where its norm is all that is looked at."""

    def __init__(self, norm: Tensor, like: Any) -> None:
        self.norm = norm  # of all its parts, as a real tensor of shape ()
        self.dtype, self.device = like.dtype, like.device
        self.dim, self.numel = like.dim, like.numel


# ---------------------------------------------------------------------------------------------------------------- checks


def alike(
    grads: Sequence[Any], params: Sequence[Any], states: Iterable[Sequence[Any]], path: Callable[[int], str]
) -> list[Any]:
    """The gradients, spread as their parameters are.

    Args:
        grads: None where there is none.
        params: the parameters.
        states: what a state holds, in lists over the parameters, that is of the parameters' shapes.
        path: names a parameter, in quotes.

    Raises:
        TypeError: a gradient or a state is sharded and its parameter is not, or the other way around; a state is spread in
            another way; or a parameter is a sum whose terms are spread.
        ValueError: gradient and parameter are spread over different meshes.
    """
    found: list[Any] = list(grads)
    pairs: list[tuple[Any, Any]] = list(zip(grads, params))
    for k, (g, p) in enumerate(pairs):
        there = g is None or spread_alike(g, p)
        if not there or partial(p):
            check_gradient(g, p, path, k)
        if g is not None and not there:
            found[k] = g.redistribute(placements=p.placements)
    check_spread(states, params, path)
    return found


def check_gradient(g: Any, p: Any, path: Callable[[int], str], k: int) -> None:
    """Refuse a gradient that cannot be spread as its parameter is."""
    if partial(p):
        raise TypeError(
            f"The parameter {path(k)} is {kind(p)}: processes hold terms of it, and a term has no step of its own. Use "
            "redistribute(placements=[Shard(0)]) or [Replicate()] first."
        )
    if g is None or placed(g) == placed(p):
        return
    if is_sharded(g) is not is_sharded(p):
        raise TypeError(f"The gradient of {path(k)} is {kind(g)}, but the parameter is {kind(p)}. {remedy(p)}")
    if g.device_mesh != p.device_mesh:
        raise ValueError(
            f"The gradient of {path(k)} is spread over {g.device_mesh}, but the parameter over {p.device_mesh}. Both must be "
            "on one mesh."
        )


def check_spread(states: Iterable[Sequence[Any]], params: Sequence[Any], path: Callable[[int], str]) -> None:
    """Refuse a state that is not spread as its parameter is."""
    for column in states:
        for k, (x, p) in enumerate(zip(column, params)):
            if spread_alike(x, p) or not isinstance(x, Tensor) or x.shape != p.shape or not x.dim():
                continue
            raise TypeError(
                f"The state of {path(k)} is {kind(x)}, but the parameter is {kind(p)}. Make a new state, or load one with "
                "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, which spreads it as the parameter is."
            )


def spread_alike(x: Any, like: Any) -> bool:
    """Whether `placed` is the same for both; asked of thousands of tensors at each step."""
    a, b = getattr(x, "_spec", None), getattr(like, "_spec", None)  # of a `DTensor`: mesh, placements and more
    if a is None or b is None:
        return placed(x) == placed(like)
    return bool(a is b or (a.placements == b.placements and (a.mesh is b.mesh or a.mesh == b.mesh)))


def placed(x: Any) -> Any:
    """How a tensor is spread, and over which processes; None if it is not."""
    return (x.device_mesh, x.placements) if is_sharded(x) else None


def kind(x: Any) -> str:
    """What a tensor is, for an error."""
    if not is_sharded(x):
        return f"a {type(x).__name__}"
    return f"a {type(x).__name__} ({', '.join(map(repr, x.placements))})"


def remedy(p: Any) -> str:
    """How to make a gradient what its parameter is."""
    if is_sharded(p):
        return "Spread it: torch.distributed.tensor.distribute_tensor(grad, param.device_mesh, param.placements)."
    return "Put it together: grad.full_tensor()."
