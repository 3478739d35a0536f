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


def unknown(plan: Plan, params: list[Any], path: Callable[[int], str]) -> str | None:
    """What is in the way of a transform that sees all parameters, if this process has no part in one of them."""
    seers = [link.transform for link in plan.links if link.transform.declaration.whole]
    seers = [value for value in seers if not (is_off(value) or value.declaration.elementwise)]
    for k, p in enumerate(params if seers else ()):
        if is_sharded(p) and p.device_mesh.get_coordinate() is None:
            return (
                f"{seers[0].declaration.name} must see all parameters, but {tree.quote(path(k))} is spread over the processes "
                f"{ranks(p.device_mesh)}, and process {distributed.get_rank()} is none of them. Give such parameters an "
                "optimizer of their own, or spread all over the same processes."
            )
    return None


def check_meshes(plan: Plan, params: list[Any], path: Callable[[int], str]) -> None:
    """Refuse a transform that sees all parameters where this process has no part in one of them.

    Raises:
        ValueError: a parameter is spread over other processes alone.
    """
    found = unknown(plan, params, path)
    if found is not None:
        raise ValueError(found)


def ranks(mesh: Any) -> list[int]:
    """The processes of a mesh, in order."""
    found: list[int] = sorted(mesh.mesh.flatten().tolist())
    return found


def check_agreement(plan: Plan, params: list[Any], path: Callable[[int], str]) -> None:
    """Refuse, in each process, a step that they cannot make together.

    The processes talk: this is for the first step, and not for each.

    Raises:
        ValueError: they do not have the same parameters, or one of them lacks what it must see.
    """
    lacks = unknown(plan, params, path)
    meshes: dict[Any, list[int]] = {}
    for k, p in enumerate(params):
        if is_sharded(p) and p.device_mesh.size() > 1 and p.device_mesh.get_coordinate() is not None:
            meshes.setdefault(p.device_mesh, []).append(k)
    for mesh in sorted(meshes, key=lambda mesh: mesh.mesh.flatten().tolist()):
        mine = {path(k): f"{tuple(params[k].shape)} {params[k].placements}" for k in meshes[mesh]}
        digest = zlib.crc32(repr(mine).encode())
        extremes = torch.tensor([digest, -digest, lacks is not None], dtype=torch.int64, device=mesh.device_type)
        groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        for group in groups:
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
        high, low, lacking = extremes.tolist()
        if high == -low and not lacking:
            continue
        everyone = [(distributed.get_rank(), mine, lacks)]
        for group in groups:
            found: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(found, everyone, group=group)
            everyone = [x for each in found for x in each]
        everyone.sort(key=lambda x: x[0])
        said = next((text for _, _, text in everyone if text is not None), None)
        raise ValueError(disagreement([(rank, own) for rank, own, _ in everyone]) if high != -low or said is None else said)
    if lacks is not None:
        raise ValueError(lacks)


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
