"""What must see whole tensors, of sharded ones: each is computed once, by the process that owns it.

Matrices of one shape are dealt out to all processes of their mesh. One all-to-all message brings the parts of each matrix to
its owner, the owner computes its matrices as a stack, and another message brings the parts of the results back (`Exchange`).
Owners are chosen by the shapes alone, so every process knows them without asking. The messages of all shapes are on their way
while the first matrices are computed. So it is with rows of tensors: a gradient with its parameter and its state.

What is in the way of that is asked beforehand (`can_deal`), and gets the same answer in every process.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, distributed

from purestep._core import maths
from purestep._core.exchange import Exchange, Item, Places, layout_of
from purestep._core.lists import in_stacks, pick
from purestep._core.sharded import Measured, summed


def can_deal(x: Any) -> bool:
    """Whether the parts of a sharded tensor can be brought together by `dealt`.

    Its placements must be torch's plain ones, and there must be a process group of all processes of its mesh: of one dimension,
    or of all processes there are.
    """
    mesh = x.device_mesh
    if mesh.ndim > 1 and mesh.size() != distributed.get_world_size():
        return False
    kinds = [type(p).__name__ for p in x.placements]
    return all([kind in ("Shard", "Replicate", "_StridedShard") for kind in kinds])


def owners(costs: Sequence[float], processes: int) -> list[int]:
    """The owner of each of some tasks, so that all have about as much to do: the largest first, to who has least."""
    return list(known_owners(tuple(costs), processes))


@functools.lru_cache(maxsize=64)
def known_owners(costs: tuple[float, ...], processes: int) -> tuple[int, ...]:
    """`owners`, which are the same in each step."""
    loads = [(0.0, k) for k in range(processes)]
    found = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        load, found[k] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[k], found[k]))
    return tuple(found)


def cost(shape: Sequence[int]) -> float:
    """What a matrix function costs, up to a factor: the products of a matrix, or of a stack of them, with itself."""
    if len(shape) < 2:
        return float(math.prod(shape))
    *stack, rows, columns = shape
    return float(math.prod(stack) * rows * columns * min(rows, columns))


def by_itself(function: Any, home: Any) -> bool:
    """Whether the part that a process has of a tensor is whole matrices, of which no other process has a copy."""
    form = getattr(function, "form", None)
    if home.device_mesh.size() == 1:
        return True
    if form is None or any([p.is_replicate() for p in home.placements]):
        return False
    return not any([form.cuts(p.dim, home.shape) for p in home.placements])


def shape_of(function: Any, home: Any) -> Sequence[int]:
    """The shape of the matrices that a function sees a tensor as."""
    form = getattr(function, "form", None)
    found: Sequence[int] = home.shape if form is None else form.shape(home.shape)
    return found


def dealt(function: Callable[..., Any], homes: list[Any], xs: list[Tensor], *rest: Any) -> list[Tensor]:
    """Apply a function of whole matrices, which takes stacks of them, where each process has parts.

    Args:
        function: ``(matrices, *rest) -> matrices`` of the same shape and dtype.
        homes: the sharded tensors whose shapes and placements the matrices have.
        xs: the parts that this process has, one for each of `homes`.
        rest: what else the function takes.

    Returns:
        a list of new tensors like `xs`.
    """
    found: list[Any] = [None] * len(xs)
    alone = [k for k, home in enumerate(homes) if by_itself(function, home)]
    for k, x in zip(alone, in_stacks(function, pick(xs, alone), *rest)):
        found[k] = x
    others = [k for k in range(len(xs)) if found[k] is None]
    costs = [cost(shape_of(function, homes[k])) for k in others]

    def several(rows: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Any]]:
        return [[x] for x in in_stacks(function, [x for (x,) in rows], *rest)], []

    made, _ = dealt_rows(several, [[homes[k]] for k in others], [[xs[k]] for k in others], costs)
    for k, (x,) in zip(others, made):
        found[k] = x
    return found


def measured(homes: Sequence[Any], *lists: Sequence[Tensor]) -> list[tuple[Measured, ...]]:
    """The norms of sharded tensors, of whose parts lists are given: one message for all.

    Args:
        homes: sharded tensors, of whose shapes, dtypes and placements all are.
        lists: the parts that this process has.

    Returns:
        for each of `homes` one for each of the lists.
    """
    parts, like, n = [x for xs in lists for x in xs], [*homes] * len(lists), len(homes)
    squares = summed(list(map(maths.square, parts)), like)
    found = [Measured(x.sqrt().to(maths.wide(part)), home) for x, part, home in zip(squares, parts, like)]
    return list(zip(*[found[k : k + n] for k in range(0, len(found), n)]))


def dealt_rows(
    function: Callable[[list[list[Tensor]]], tuple[list[list[Tensor]], list[Any]]],
    homes: Sequence[Sequence[Any]],
    rows: Sequence[Sequence[Tensor]],
    costs: Sequence[float],
    numbers: int = 0,
    given: int = 0,
) -> tuple[list[list[Tensor]], list[Any]]:
    """Apply a function to rows of tensors, each in the process that owns it, where each process has parts.

    Args:
        function: makes of some rows of whole tensors, which it may overwrite, rows of new ones, and some numbers, which are the
            same for all rows. Of the last `given` tensors of a row it makes none, of the others one each, of the same shape and
            dtype.
        homes: for each row what its tensors are spread like. The first is a sharded one, and the others are sharded on the same
            mesh, or the same in all processes.
        rows: the parts that this process has.
        costs: of each row.
        numbers: how many numbers the function returns.
        given: how many tensors of each row are no more than looked at.

    Returns:
        the parts of the results that this process has, in new tensors, and the numbers. Those of a process that has no part
        in a mesh are what it has.

    Raises:
        RuntimeError: the function has failed in another process.
    """
    found: list[list[Any]] = [[] for _ in rows]
    notes: list[Any] = []
    meshes: dict[Any, list[int]] = {}
    for k, (home, *_) in enumerate(homes):
        meshes.setdefault(home.device_mesh, []).append(k)
    exchanges: list[tuple[list[int], Exchange]] = []
    for mesh, ks in meshes.items():
        if mesh.get_coordinate() is None:  # this process has no part in it
            for k in ks:
                found[k] = [x.clone() for x in rows[k][: len(rows[k]) - given]]
            continue
        owner, places = dict(zip(ks, owners([costs[k] for k in ks], mesh.size()))), Places.of(mesh)
        kinds: dict[Any, list[int]] = {}
        for k in ks:
            kind = tuple([(h.shape, getattr(h, "placements", None), x.dtype) for h, x in zip(homes[k], rows[k])])
            kinds.setdefault(kind, []).append(k)
        for alike in kinds.values():
            n = len(homes[alike[0]]) - given
            items = [
                Item(home, x, owner[k], layout_of(home, mesh), m < n)
                for k in alike
                for m, (home, x) in enumerate(zip(homes[k], rows[k]))
            ]
            exchanges.append((alike, Exchange(places, items, numbers)))
    for _, exchange in exchanges:
        exchange.gather()
    error: Exception | None = None
    for ks, exchange in exchanges:
        error = computed(function, exchange, len(ks), error)
    if error is not None:
        for _, exchange in exchanges:
            exchange.work.wait()
        raise error
    for ks, exchange in exchanges:
        parts = iter(exchange.parts())
        for k in ks:
            found[k] = [next(parts) for _ in rows[k][: len(rows[k]) - given]]
        notes = exchange.notes
    return found, notes


def computed(function: Callable[..., Any], exchange: Exchange, rows: int, error: Exception | None) -> Exception | None:
    """Compute what this process owns of so many rows, and send it; after an error, which is returned, say so to the others."""
    width = len(exchange.items) // rows
    whole = exchange.whole()
    made: list[Tensor] | None = []
    notes: list[Any] = []
    if whole and error is None:
        try:
            new, notes = function([whole[k : k + width] for k in range(0, len(whole), width)])
            made = [x for row in new for x in row]
            check_made(made, [exchange.items[k] for k in exchange.made])
        except Exception as failed:  # the others wait for an answer
            error = failed
    exchange.scatter(None if error is not None else made, notes)
    return error


def check_made(made: list[Tensor], items: list[Item]) -> None:
    """Refuse results that no process but this one expects."""
    for x, item in zip(made, items):
        if x.shape != item.home.shape or x.dtype != item.home.dtype:
            raise TypeError(
                "The update of a sharded parameter must keep shapes and dtypes, but a tensor of shape "
                f"{tuple(item.home.shape)}, {item.home.dtype}, became one of {tuple(x.shape)}, {x.dtype}. Under "
                "executor='leaf' every process computes all, and may change them."
            )
