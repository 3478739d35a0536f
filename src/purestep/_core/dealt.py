"""Functions of whole matrices that are spread over processes: each matrix is computed once, by the process that owns it.

Matrices of one shape are dealt out to all processes of their mesh. One all-to-all message brings the parts of each matrix to
its owner, the owner computes its matrices as a stack, and another message brings the parts of the results back. Owners are
chosen by the shapes alone, so every process knows them without asking. The messages of all shapes are on their way while the
first matrices are computed.

What is in the way of that is asked beforehand (`can_deal`), and gets the same answer in every process.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed

from purestep._core.lists import in_stacks, pick

Block: TypeAlias = tuple[tuple[int, int], ...]
"""The part of a tensor that a process has: along each dimension from where to where."""


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


class Layout:
    """Where the parts of a tensor are: the processes of a mesh, by their place in it, and the part that each has."""

    def __init__(self, mesh: Any, placements: Sequence[Any], shape: torch.Size) -> None:
        sizes = tuple(mesh.mesh.shape)
        coordinates = list(itertools.product(*map(range, sizes)))
        self.blocks = [block_at(c, sizes, placements, shape) for c in coordinates]
        self.counts = [math.prod([stop - start for start, stop in b]) for b in self.blocks]
        copies = [k for k, p in enumerate(placements) if p.is_replicate()]
        self.copy = [tuple([c[k] for k in copies]) for c in coordinates]  # which of several copies a process belongs to

    def sources(self, owner: int) -> list[int]:
        """The places of the processes from which the owner gets one copy of all parts."""
        return [k for k, copy in enumerate(self.copy) if copy == self.copy[owner]]


def block_at(coordinate: Sequence[int], sizes: Sequence[int], placements: Sequence[Any], shape: Sequence[int]) -> Block:
    """The part of a tensor that the process at a coordinate of the mesh has; chunks as `torch.chunk` makes them.

    Dimensions of the mesh cut a tensor one after the other; those with a ``_StridedShard``, as FSDP2 has beside tensor
    parallelism, cut what the ones behind them have left.
    """
    block = [(0, n) for n in shape]
    cuts = [k for k, p in enumerate(placements) if not p.is_replicate()]
    strided = [k for k in cuts if type(placements[k]).__name__ == "_StridedShard"]
    for k in [*[k for k in cuts if k not in strided], *reversed(strided)]:
        start, stop = block[placements[k].dim]
        chunk = -(-(stop - start) // sizes[k])
        first = min(start + coordinate[k] * chunk, stop)
        block[placements[k].dim] = first, min(first + chunk, stop)
    return tuple(block)


def owners(costs: Sequence[float], processes: int) -> list[int]:
    """The owner of each of some tasks, so that all have about as much to do: the largest first, to who has least."""
    loads = [0.0] * processes
    found = [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        found[k] = loads.index(min(loads))
        loads[found[k]] += costs[k]
    return found


def cost(shape: Sequence[int]) -> float:
    """What a matrix function costs, up to a factor: the products of a matrix, or of a stack of them, with itself."""
    *stack, rows, columns = shape
    return float(math.prod(stack) * rows * columns * min(rows, columns))


class Exchange:
    """The matrices of one shape and one layout: their parts go to their owners, and the parts of the results come back."""

    def __init__(self, homes: Sequence[Any], places: Sequence[int], xs: Sequence[Tensor]) -> None:
        """`homes` are the sharded tensors, `places` those of their owners in the mesh, and `xs` the parts of this process."""
        mesh, self.xs, self.places = homes[0].device_mesh, xs, places
        self.shape, self.layout = homes[0].shape, layout_of(homes[0])
        group: Any = mesh.get_group() if mesh.ndim == 1 else distributed.group.WORLD
        self.group = group
        ranks = mesh.mesh.flatten().tolist()
        self.me = ranks.index(distributed.get_rank())
        order = [distributed.get_group_rank(group, rank) for rank in ranks]
        self.order = sorted(range(len(ranks)), key=order.__getitem__)  # places in the mesh, as the group counts them
        self.owned = [k for k, place in enumerate(places) if place == self.me]
        self.buffer = xs[0].new_empty(0)
        self.work: Any = None

    def _send(self, pieces: list[list[Tensor]], counts: list[int]) -> None:
        """Send some tensors to each place, and begin to receive so many numbers from each; both in the group's order."""
        flat = [x.reshape(-1) for each in pieces for x in each]
        sent = torch.cat(flat) if flat else self.xs[0].new_empty(0)
        self.buffer = sent.new_empty(sum(counts))
        sizes = [sum([x.numel() for x in each]) for each in pieces]
        self.work = distributed.all_to_all_single(self.buffer, sent, counts, sizes, group=self.group, async_op=True)

    def _received(self) -> Tensor:
        """What has come."""
        self.work.wait()
        return self.buffer

    def gather(self) -> None:
        """Send the parts that this process has to the owners of their matrices."""
        sends = [self.me in self.layout.sources(place) for place in range(len(self.order))]
        pieces = [[x for x, owner in zip(self.xs, self.places) if owner == place and sends[place]] for place in self.order]
        sources = set(self.layout.sources(self.me))
        self._send(pieces, [len(self.owned) * self.layout.counts[place] * (place in sources) for place in self.order])

    def compute(self, function: Callable[..., Any], rest: Sequence[Any]) -> None:
        """Put the matrices together that this process owns, compute, and send each process its parts of the results."""
        flat, blocks, counts = self._received(), self.layout.blocks, self.layout.counts
        whole = [flat.new_empty(self.shape) for _ in self.owned]
        sources, start = set(self.layout.sources(self.me)), 0
        for place in self.order:
            for x in whole if place in sources else ():
                part(x, blocks[place]).copy_(flat[start : start + counts[place]].view(lengths(blocks[place])))
                start += counts[place]
        made = in_stacks(function, whole, *rest) if whole else []
        pieces = [[part(x, blocks[place]) for x in made] for place in self.order]
        self._send(pieces, [self.places.count(place) * counts[self.me] for place in self.order])

    def results(self) -> list[Tensor]:
        """The parts of the results that this process has, in the order of the matrices."""
        pieces = iter(torch.split(self._received(), self.layout.counts[self.me]) if self.layout.counts[self.me] else ())
        found: list[Any] = [None] * len(self.xs)
        for place in self.order:
            for k in [k for k, owner in enumerate(self.places) if owner == place]:
                found[k] = next(pieces).view(self.xs[k].shape) if self.layout.counts[self.me] else self.xs[k].clone()
        return found


def layout_of(x: Any) -> Layout:
    """The layout of a sharded tensor."""
    return Layout(x.device_mesh, x.placements, x.shape)


def part(x: Tensor, block: Block) -> Tensor:
    """A part of a tensor, as a view of it."""
    return x[tuple([slice(*ends) for ends in block])]


def lengths(block: Block) -> list[int]:
    """The shape of a part."""
    return [stop - start for start, stop in block]


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
    exchanges: list[tuple[list[int], Exchange]] = []
    meshes: dict[Any, list[int]] = {}
    for k, home in enumerate(homes):
        if found[k] is None:
            meshes.setdefault(home.device_mesh, []).append(k)
    for mesh, rows in meshes.items():
        if mesh.get_coordinate() is None:  # this process has no part in it
            found = [x.clone() if k in rows else y for k, (x, y) in enumerate(zip(xs, found))]
            continue
        places = dict(zip(rows, owners([cost(shape_of(function, homes[k])) for k in rows], mesh.size())))
        kinds: dict[Any, list[int]] = {}
        for k in rows:
            kinds.setdefault((homes[k].shape, homes[k].placements, xs[k].dtype), []).append(k)
        exchanges += [(ks, Exchange(pick(homes, ks), [places[k] for k in ks], pick(xs, ks))) for ks in kinds.values()]
    for _, exchange in exchanges:
        exchange.gather()
    for _, exchange in exchanges:
        exchange.compute(function, rest)
    for ks, exchange in exchanges:
        for k, x in zip(ks, exchange.results()):
            found[k] = x
    return found
