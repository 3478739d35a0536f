"""What several processes must agree about before they talk to each other.

Where they do not, one would send what the other does not wait for. So it is found out before, and all of them say the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from purestep._core import tree
from purestep._core.primitives import Primitive, fresh_state, is_off
from purestep._core.sharded import is_sharded
from purestep._engine.plan import Plan
from purestep._executors.chains import detail
from purestep._trace.program import program


def must_see_whole(value: Primitive, p: Tensor) -> bool:
    """Whether a transform is wrong on a part of a parameter like this one."""
    d = value.declaration
    if is_off(value) or d.elementwise:
        return False
    if d.whole or d.arrays:
        return True
    state = fresh_state(value, torch.empty(p.shape, dtype=p.dtype, device="meta"))
    part = detail(value, tuple([x is None for x in state]))
    return not program((part,), False, False, False, d, form="single").elementwise


def check_meshes(plan: Plan, params: list[Any], path: Callable[[int], str]) -> None:
    """Refuse parameters of different processes in a transform that sees all parameters: none of them could know its number.

    Raises:
        ValueError: a parameter is spread over other processes than the first one that is spread.
    """
    seers = [link.transform for link in plan.links if link.transform.declaration.whole]
    seers = [value for value in seers if not (is_off(value) or value.declaration.elementwise)]
    if not seers:
        return
    first: int | None = None
    for k, p in enumerate(params):
        if not is_sharded(p):
            continue
        first = k if first is None else first
        mesh, other = p.device_mesh, params[first].device_mesh
        if mesh is not other and mesh != other and ranks(mesh) != ranks(other):
            raise ValueError(
                f"{seers[0].declaration.name} must see all parameters, but {tree.quote(path(first))} is spread over the "
                f"processes {ranks(other)} and {tree.quote(path(k))} over {ranks(mesh)}: none of them knows both. Give them "
                "optimizers of their own, or spread them over the same processes."
            )


def ranks(mesh: Any) -> list[int]:
    """The processes of a mesh, in order."""
    found: list[int] = sorted(mesh.mesh.flatten().tolist())
    return found


def check_agreement(params: list[Any], path: Callable[[int], str]) -> None:
    """Refuse a step in which processes of one mesh have different parameters, in each of them.

    The processes talk: this is for the first step, and not for each.

    Raises:
        ValueError: they do not have the same parameters.
    """
    meshes: dict[Any, list[int]] = {}
    for k, p in enumerate(params):
        if is_sharded(p) and p.device_mesh.size() > 1 and p.device_mesh.get_coordinate() is not None:
            meshes.setdefault(p.device_mesh, []).append(k)
    for mesh in sorted(meshes, key=lambda mesh: mesh.mesh.flatten().tolist()):
        mine = {path(k): f"{tuple(params[k].shape)} {params[k].placements}" for k in meshes[mesh]}
        digest = zlib.crc32(repr(mine).encode())
        extremes = torch.tensor([digest, -digest], dtype=torch.int64, device=mesh.device_type)
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        for group in groups:
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
        high, low = extremes.tolist()
        if high == -low:
            continue
        everyone = [(distributed.get_rank(), mine)]
        for group in groups:
            found: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(found, everyone, group=group)
            everyone = [x for each in found for x in each]
        raise ValueError(disagreement(sorted(everyone, key=lambda x: x[0])))


def disagreement(everyone: list[tuple[int, dict[str, str]]]) -> str:
    """What is different in the parameters of the first process and of the first that has others."""
    rank, first = everyone[0]
    other, its = next(x for x in everyone if list(x[1].items()) != list(first.items()))
    lone = [(who, name) for who, own, theirs in ((rank, first, its), (other, its, first)) for name in own if name not in theirs]
    if lone:
        who, name = lone[0]
        what = f"process {who} makes it with {tree.quote(name)}, and process {other if who == rank else rank} without"
    else:
        what = "their order differs"
        for name in [name for name in first if first[name] != its[name]][:1]:
            what = f"{tree.quote(name)} is {first[name]} in process {rank}, and {its[name]} in process {other}"
    return (
        f"All processes must make the same step, or they wait for each other, but {what}. Every process needs the same "
        "parameters in the same order, and a gradient for the same ones."
    )
