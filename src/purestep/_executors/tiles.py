"""Large tensors, run through a program in pieces that stay in the cache.

A program makes as many passes over its tensors as it has lines. Over 2^18 elements at a time all passes but the first find
them in the cache, and temporaries stay small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain as flat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.lists import overwrite
from purestep._core.torch_api import foreach_copy_
from purestep._executors.flat_buffer import SIZE
from purestep._trace.program import Form, LeafDeclaration, Program, program

SHORT = 4
"""A program of so many operations costs less without blocks, where there is nothing that may be overwritten."""

TILE = 2**18
"""On a CPU a program works on this many elements at a time."""


class Variant(NamedTuple):
    """Which variant of a chain's program is run: see `purestep._trace.program.program`."""

    recipe: tuple[Any, ...]
    declarations: Sequence[LeafDeclaration]
    apply: bool
    own: bool = False
    donate: bool = False
    kernels: bool = False  # torch's fused kernels may be called for lines that they compute

    def program(self, donate: bool, form: Form = "lists") -> Program:
        """The program, which overwrites what it is given or not."""
        return program(self.recipe, self.apply, self.own, donate, *self.declarations, form=form)


def calculate(variant: Variant, given: tuple[list[Tensor], list[Tensor], list[Any]], numbers: list[Any]) -> tuple[Any, ...]:
    """What a program returns: run on all tensors at once, or in tiles if they are large.

    `given` are the gradients, the parameters, and the fields of the state, each a list or a number.
    """
    donate, kernels = variant.donate, variant.kernels
    grads, params, columns = given
    cuts = tile_slices(params)
    overwriting = variant.program(True, "kernels" if kernels else "lists")
    if donate and overwriting.fails:
        return overwritten(variant, given, numbers)
    if cuts is not None or (kernels and not donate):  # the kernels overwrite what they are given
        found = Tiles.of(overwriting, grads, params, columns, donate)
        if found is not None:
            return found.run(numbers, donate)
    run = (overwriting if donate else variant.program(False)).run
    if cuts is None:
        return run(grads, params, *columns, *numbers)
    made = [run(grads[s], params[s], *[c[s] if isinstance(c, list) else c for c in columns], *numbers) for s in cuts]
    return tuple([list(flat.from_iterable(x)) if isinstance(x[0], (list, tuple)) else x[0] for x in zip(*made)])


def overwritten(variant: Variant, given: tuple[list[Tensor], list[Tensor], list[Any]], numbers: list[Any]) -> tuple[Any, ...]:
    """What a program returns that may raise on its way: it writes into the memory that was given away at its end alone."""
    grads, params, columns = given
    updates, *results = variant.program(False).run(grads, params, *columns, *numbers)
    if variant.apply:
        updates = overwrite(params, list(updates))
    return updates, *[overwrite(c, list(x)) if isinstance(c, list) else x for c, x in zip(columns, results)]


class Tiles(NamedTuple):
    """A program that can be run on pieces, and lists of large tensors, to be run on pieces that fit the cache.

    The program overwrites what it is given. What was not given away is copied first, piece by piece, into memory that is
    handed out in the end.
    """

    program: Program
    grads: list[Tensor]
    params: list[Tensor]
    columns: list[Any]  # lists, and numbers

    @classmethod
    def of(cls, program: Program, grads: list[Tensor], params: list[Tensor], columns: list[Any], donate: bool) -> Tiles | None:
        """None if the program must see whole tensors, they are not each in one piece, or to copy them costs more than it."""
        if not donate and program.length <= SHORT:
            return None
        lists = [grads, params, *[c for c in columns if isinstance(c, list)]]
        whole = not program.block or TILE % program.block
        if whole or not all([all(map(Tensor.is_contiguous, x)) for x in lists]):
            return None
        return cls(program, grads, params, columns)

    def run(self, numbers: list[Any], donate: bool) -> tuple[Any, ...]:
        """What the program returns for the whole."""
        apply = self.program.apply
        params = room(self.params) if apply and not donate else self.params
        columns = [room(c) if isinstance(c, list) and not donate else c for c in self.columns]
        updates = params if apply else room(self.params)
        results = self.fill(numbers, params, columns, updates)
        return updates, *[c if isinstance(c, list) else x for c, x in zip(columns, results)]

    def fill(self, numbers: list[Any], params: list[Tensor], columns: list[Any], updates: list[Tensor]) -> tuple[Any, ...]:
        """Write what the program returns to these places, which may be those of what is given; return the numbers of it."""
        sizes = [p.numel() for p in self.params]
        fresh = [(a, b) for a, b in zip((self.params, *self.columns), (params, *columns)) if a is not b and isinstance(a, list)]
        size = self.program.block
        copies = [(cut(a, sizes, size), cut(b, sizes, size)) for a, b in fresh]
        new = [cut(c, sizes, size) for c in (params, *columns) if isinstance(c, list)]
        grads, out = cut(self.grads, sizes), cut(updates, sizes)
        results: tuple[Any, ...] = ()
        for block in blocks([x.numel() for x in grads]):
            for x, y in copies:
                foreach_copy_(y[block], x[block])
            pieces = iter(new)
            p = next(pieces)[block]
            given = [next(pieces)[block] if isinstance(c, list) else c for c in columns]
            results = self.program.run(grads[block], p, *given, *numbers)
            if not self.program.apply:
                foreach_copy_(out[block], list(results[0]))
        return results[1:]


def through(
    program: Program,
    kernel: Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]]], None],
    given: tuple[list[Tensor], list[Tensor], list[Any], dict[str, list[Tensor]]],
    numbers: list[Any],
) -> list[Any]:
    """A program, and a kernel that takes its updates, in place, block by block: what is made in between stays in the cache.

    `given` are the gradients, the parameters, the fields of the state that the program takes, and those of the kernel.
    Returned are the fields that the program returns.
    """
    grads, params, columns, states = given
    sizes = [p.numel() for p in params]
    g, p = cut(grads, sizes), cut(params, sizes)
    c = [cut(x, sizes) if isinstance(x, list) else x for x in columns]
    s = {name: cut(x, sizes) for name, x in states.items()}
    results: tuple[Any, ...] = ()
    for block in blocks([x.numel() for x in g]):
        results = program.run(g[block], p[block], *[x[block] if isinstance(x, list) else x for x in c], *numbers)
        kernel(p[block], list(results[0]), {name: x[block] for name, x in s.items()})
    return [x if isinstance(x, list) else y for x, y in zip(columns, results[1:])]


def room(xs: list[Tensor]) -> list[Tensor]:
    """Memory for as many tensors of the same shapes."""
    return [torch.empty_like(x) for x in xs]


def cut(xs: list[Tensor], sizes: list[int], block: int = 1) -> list[Tensor]:
    """What belongs to large tensors, in pieces, the rest as it is: a number each, or one for each `block` of them."""
    pieces: list[Tensor] = []
    for x, size in zip(xs, sizes):
        pieces += torch.split(x.view(-1), TILE if x.numel() == size else TILE // block) if size > TILE else (x,)
    return pieces


def blocks(sizes: list[int]) -> list[slice]:
    """Consecutive slices of about `TILE` elements each."""
    cuts, start, size = [], 0, 0
    for k, n in enumerate(sizes):
        if size and size + n > TILE:
            cuts.append(slice(start, k))
            start, size = k, 0
        size += n
    return [*cuts, slice(start, len(sizes))]


def tile_slices(params: list[Tensor]) -> list[slice] | None:
    """Slices of the parameters of about `TILE` elements each; None for all at once: for small ones, and on accelerators."""
    if not params[0].is_cpu:
        return None
    sizes = list(map(Tensor.numel, params))
    return None if sum(sizes) <= max(2 * TILE, SIZE * len(sizes)) else blocks(sizes)


def pieces(flat: Tensor) -> list[Tensor]:
    """One long tensor in pieces that fit the cache."""
    return list(torch.split(flat, TILE))
