"""Tensors that are spread over processes go to their owners in one message, and what is made of them comes back in another.

A message is one all-to-all of bytes, whatever the shapes and dtypes. What a process sends another on the way back begins with
whether it has failed, and some numbers: so a process whose computation fails ends all, and none waits for it. On an accelerator
nothing is read, so there the others are ended by whoever started them, as `torchrun` does.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, distributed

Block: TypeAlias = tuple[tuple[int, int], ...]
"""The part of a tensor that a process has: along each dimension from where to where."""


class Layout:
    """Where the parts of a tensor are: the processes of a mesh, by their place in it, and the part that each has."""

    def __init__(self, sizes: Sequence[int], placements: Sequence[Any], shape: Sequence[int]) -> None:
        coordinates = list(itertools.product(*map(range, sizes)))
        self.blocks = [block_at(c, sizes, placements, shape) for c in coordinates]
        self.counts = [math.prod([stop - start for start, stop in b]) for b in self.blocks]
        copies = [k for k, p in enumerate(placements) if p.is_replicate()]
        self.copy = [tuple([c[k] for k in copies]) for c in coordinates]  # which of several copies a process belongs to


@functools.lru_cache(maxsize=1024)
def known_layout(sizes: tuple[int, ...], placements: tuple[Any, ...], shape: tuple[int, ...]) -> Layout:
    """`Layout`, of which models have few."""
    return Layout(sizes, placements, shape)


def layout_of(x: Any, mesh: Any = None) -> Layout:
    """The layout of a sharded tensor; of any other, which every process of the `mesh` has."""
    if hasattr(x, "placements"):
        return known_layout(tuple(x.device_mesh.shape), tuple(x.placements), tuple(x.shape))
    replicate = torch.distributed.tensor.Replicate()  # pyright: ignore[reportAttributeAccessIssue]
    return known_layout(tuple(mesh.shape), (replicate,) * mesh.ndim, tuple(x.shape))


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


def part(x: Tensor, block: Block) -> Tensor:
    """A part of a tensor, as a view of it."""
    return x[tuple([slice(*ends) for ends in block])]


def lengths(block: Block) -> list[int]:
    """The shape of a part."""
    return [stop - start for start, stop in block]


def in_bytes(x: Tensor) -> Tensor:
    """The memory of a tensor, or of a copy that lies in order."""
    return x.contiguous().view(-1).view(torch.uint8)


def out_of_bytes(flat: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`in_bytes` undone."""
    return flat.view(dtype).view(shape)


class Item(NamedTuple):
    """A tensor that is spread over processes."""

    home: Any  # the sharded tensor, or a plain one that every process has
    x: Tensor  # the part of it that this process has
    owner: int  # the place in the mesh of the process that it goes to
    layout: Layout
    returns: bool = True  # whether something like it comes back

    def bytes_of(self, place: int) -> int:
        """How many bytes the part is that a process has."""
        return self.layout.counts[place] * self.x.element_size()


class Places(NamedTuple):
    """The processes of a mesh: a place is a number in the order of the mesh."""

    group: Any  # of all of them
    ranks: list[int]  # of each place
    me: int  # the place of this process
    order: list[int]  # the places in the order of the group

    @classmethod
    def of(cls, mesh: Any) -> Places:
        """Those of a mesh that this process is in."""
        group: Any = mesh.get_group() if mesh.ndim == 1 else distributed.group.WORLD
        ranks = mesh.mesh.flatten().tolist()
        order = [distributed.get_group_rank(group, rank) for rank in ranks]
        return cls(group, ranks, ranks.index(distributed.get_rank()), sorted(range(len(ranks)), key=order.__getitem__))


class Exchange:
    """Some tensors of one mesh on their way to their owners, and back."""

    def __init__(self, places: Places, items: Sequence[Item], numbers: int = 0) -> None:
        """`numbers` is how many numbers owners send all others beside the tensors."""
        self.items, self.numbers = items, numbers
        self.group, self.ranks, self.me, self.order = places
        sizes = [item.x.element_size() for item in items]
        self.unit = max(8, *sizes)  # what one process sends another is a multiple of it, so that numbers begin where they may
        self.of: list[list[int]] = [[] for _ in self.ranks]  # the items of each owner, the widest numbers first
        for k in sorted(range(len(items)), key=lambda k: -sizes[k]):
            self.of[items[k].owner].append(k)
        self.owned = [k for k, item in enumerate(items) if item.owner == self.me]
        self.made = [k for k in self.owned if items[k].returns]
        self.device = items[0].x.device
        self.header = self._padded(8 * (1 + numbers))
        self.notes: Any = []
        self.buffer = torch.empty(0)
        self.work: Any = None

    def _padded(self, count: int) -> int:
        """A number of bytes, with those that fill it up."""
        return -(-count // self.unit) * self.unit

    def _send(self, chunks: list[list[Tensor]], counts: list[int]) -> None:
        """Send some bytes to each place, and begin to receive so many from each; both in the group's order."""
        sizes: list[int] = []
        flat: list[Tensor] = []
        for chunk in chunks:
            size = sum([x.numel() for x in chunk])
            sizes.append(self._padded(size))
            flat += [*chunk, self._zeros(sizes[-1] - size)]
        sent = torch.cat(flat)
        self.buffer = sent.new_empty(sum(counts))
        self.work = distributed.all_to_all_single(self.buffer, sent, counts, sizes, group=self.group, async_op=True)

    def _received(self, counts: list[int]) -> list[Tensor]:
        """The bytes that have come from each place, in the group's order."""
        self.work.wait()
        return list(torch.split(self.buffer, counts))

    def _gathered(self, source: int, owner: int) -> list[int]:
        """The items of which one place sends its parts to another, their owner; in the order in which they are sent."""
        return [k for k in self.of[owner] if (copy := self.items[k].layout.copy)[source] == copy[owner]]

    def _returned(self, owner: int) -> list[int]:
        """The items of which a place sends parts to all others, as it sends them."""
        return [k for k in self.of[owner] if self.items[k].returns]

    def _counts(self, place: int, items: list[int], header: int = 0, here: bool = False) -> int:
        """How many bytes the parts are that a place has of these items, or this process."""
        return self._padded(header + sum([self.items[k].bytes_of(self.me if here else place) for k in items]))

    def _zeros(self, count: int) -> Tensor:
        """So many bytes."""
        return torch.zeros(count, dtype=torch.uint8, device=self.device)

    def gather(self) -> None:
        """Send the parts that this process has to the owners."""
        chunks = [[in_bytes(self.items[k].x) for k in self._gathered(self.me, place)] for place in self.order]
        self._send(chunks, [self._counts(place, self._gathered(place, self.me)) for place in self.order])

    def whole(self) -> list[Tensor]:
        """The tensors that this process owns, in the order of the items and in memory of their own."""
        found = {k: self.items[k].x.new_empty(self.items[k].home.shape) for k in self.owned}
        froms = [self._gathered(place, self.me) for place in self.order]
        counts = [self._counts(place, ks) for place, ks in zip(self.order, froms)]
        for place, ks, flat in zip(self.order, froms, self._received(counts)):
            start = 0
            for k in ks:
                item = self.items[k]
                size, block = item.bytes_of(place), item.layout.blocks[place]
                part(found[k], block).copy_(out_of_bytes(flat[start : start + size], lengths(block), item.x.dtype))
                start += size
        return [found[k] for k in self.owned]

    def scatter(self, made: Sequence[Tensor] | None, notes: Sequence[Any] = ()) -> None:
        """Send each process its parts of what was made of the tensors that this process owns.

        Args:
            made: one for each of these that returns, of its shape and dtype; None if this process has failed.
            notes: the numbers.
        """
        notes = list(notes) if made is not None and self.owned else [0.0] * self.numbers
        numbers = [float(made is None), *notes]
        if all([isinstance(x, float) for x in numbers]):
            head = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        else:
            head = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in numbers])
        head = torch.cat([in_bytes(head), self._zeros(self.header - 8 * len(numbers))])
        found = dict(zip(self.made, made or ()))
        mine = self._returned(self.me)
        chunks = []
        for place in self.order:
            blocks = [self.items[k].layout.blocks[place] for k in mine]
            if made is None:
                sizes = [self.items[k].bytes_of(place) for k in mine]
                chunks.append([head, self._zeros(sum(sizes))])
            else:
                chunks.append([head, *[in_bytes(part(found[k], block)) for k, block in zip(mine, blocks)]])
        self._send(chunks, [self._counts(place, self._returned(place), self.header, here=True) for place in self.order])

    def parts(self) -> list[Tensor]:
        """The parts of the results that this process has, in the order of the items that return.

        Raises:
            RuntimeError: another process has failed.
        """
        found: dict[int, Tensor] = {}
        tos = [self._returned(place) for place in self.order]
        counts = [self._counts(place, ks, self.header, here=True) for place, ks in zip(self.order, tos)]
        heads = []
        for ks, flat in zip(tos, self._received(counts)):
            heads.append(flat[: 8 * (1 + self.numbers)].view(torch.float64))
            start = self.header
            for k in ks:
                item = self.items[k]
                size = item.bytes_of(self.me)
                found[k] = out_of_bytes(flat[start : start + size], item.x.shape, item.x.dtype)
                start += size
        self._note(heads)
        return [found[k] for k, item in enumerate(self.items) if item.returns]

    def _note(self, heads: list[Tensor]) -> None:
        """Look at what the processes have said beside the tensors; the numbers are those of the first that owns anything."""
        if self.device.type == "cpu":
            bad = [self.ranks[place] for place, head in zip(self.order, heads) if head[0].item()]
            if bad:
                raise RuntimeError(
                    f"Process {bad[0]} could not compute the update of a parameter that it owns, so no process makes this "
                    "step. Its own error says why."
                )
        owner = self.items[0].owner
        numbers = next(head for place, head in zip(self.order, heads) if place == owner)[1:]
        self.notes = numbers.tolist() if numbers.is_cpu else list(numbers.unbind())
