"""The averages of parameters that an algorithm's state has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from purestep._core.maths import readable, where
from purestep._core.primitives import Link, fields_of, state_type
from purestep._optimizer.selection import Contents
from purestep.transform import Transform


@torch.no_grad()
def averages_in(contents: Contents, transforms: list[Transform]) -> dict[Tensor, Tensor]:
    """The averages of the parameters that have one; the first link that has one for a parameter decides."""
    found: dict[Tensor, Tensor] = {}
    for group, transform in zip(contents.groups, transforms):
        for link, names, off in zip(transform.links, transform.plan.keys, transform.plan.off):
            kind: Any = state_type(link.transform)
            if off or not (hasattr(kind, "evaluated") or hasattr(kind, "averaged")):
                continue
            for p, yes in zip(group["params"], contents.selected(link.masks, group["params"])):
                if p not in found and yes and (x := average(contents, link, names, p)) is not None:
                    found[p] = x
    return found


def average(contents: Contents, link: Link, names: tuple[str, ...], p: Tensor) -> Tensor | None:
    """The average of one parameter in the state of one link, with the names of its fields; None where there is none yet."""
    kind: Any = state_type(link.transform)
    own, leaves = contents.of(p), fields_of(link.transform).leaves
    fields = [own.get(n) if leaf else contents.shared.get(n) for n, leaf in zip(names, leaves)]
    if any([x is None for x in fields]):
        return None
    if hasattr(kind, "averaged"):
        inner = [None] if link.transform.declaration.inner else []
        (found,) = kind(*[[x] if leaf else x for x, leaf in zip(fields, leaves)], *inner).averaged()
        return found
    state = kind(*fields)
    new = state.step == 0
    if not readable(new):
        return where(new, p.detach(), state.evaluated(p.detach()))
    return None if new else state.evaluated(p.detach())


@contextlib.contextmanager
def in_place_of_params(averages: dict[Tensor, Tensor]) -> Iterator[None]:
    """For as long as a ``with`` lasts, parameters hold their averages; then every bit of what they held before."""
    with torch.no_grad():
        before = [p.clone() for p in averages]
    try:
        with torch.no_grad():
            for p, x in averages.items():
                p.copy_(x)
        yield
    finally:
        with torch.no_grad():
            for p, x in zip(averages, before):
                p.copy_(x)
