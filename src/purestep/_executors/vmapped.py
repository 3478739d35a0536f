"""One level of `torch.func.vmap`, stepped out of: a program on stacked tensors instead of a batched operation for each line.

`vmap` puts a dimension in front of every tensor and sends each operation through its rules, which costs several
microseconds and keeps every temporary. An elementwise program does not care for shapes, so it can be run on the stacked
tensors themselves, below that level. What differs from member to member is numbers: where members are large, the program
runs for one after the other, with plain numbers; where they are small, for some at a time, with a column of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.torch_api import without_innermost_interpreter
from purestep._executors.task import Base, Mode, Result, Task
from purestep._executors.tiles import SHORT, TILE, Tiles, Variant, calculate, room
from purestep._executors.vmap_level import VmapLevel
from purestep._trace.program import LeafDeclaration, program

LARGE = 2**16
"""From so many elements on a member is run by itself."""

FEW = 2**22
"""Up to so many elements in all members together, small ones are run at once: temporaries cost less than blocks."""


class Vmapped(Base):
    """All members of a vmap, and all parameters, at once."""

    modes: tuple[Mode, ...] = ("leaf",)
    name = "vmapped"
    when = "inside one `torch.func.vmap` and no other transform of `torch.func`, elementwise transforms on batched tensors"
    how = "the program on the stacked tensors, as if there were no `vmap`: one foreach call for all parameters of all members"

    def declines(self, task: Task) -> str | None:
        if task.env.level is None:
            return "this is not the inside of a single vmap"
        return None if task.counters_equal else "the parameters have made different numbers of updates"

    def run(self, task: Task) -> Result | None:
        columns, places, news = task.arranged()
        numbers = task.numbers.of_chain(task.chain, task.fields)
        level = task.env.level
        assert level is not None
        found = run_stacked(
            level, task.recipe, task.chain.declarations, (task.grads, task.params, columns), numbers, task.applies
        )
        if found is None:
            return None
        for (j, f), x in zip(places, found[1:]):
            news[j][f] = x
        for own, new in zip(task.fields, news):
            for f, (old, x) in enumerate(zip(own, new)):
                new[f] = x if x is None or isinstance(x, list) else [task.numbers.counted(old[0], x)] * len(task.params)
        return Result(list(found[0]), news)


def run_stacked(
    level: VmapLevel,
    recipe: tuple[Any, ...],
    declarations: Sequence[LeafDeclaration],
    given: tuple[list[Tensor], list[Tensor], list[Any]],
    numbers: list[Any],
    apply: bool,
) -> tuple[Any, ...] | None:
    """What the program of a recipe returns, as `purestep._executors.tiles.calculate` does; None if it takes a vmap to know.

    Every tensor must be batched: what does not depend on the member must not come out as if it did.
    """
    if not program(recipe, apply, False, False, *declarations).elementwise:
        return None
    grads, params, columns = given
    listed = [c for c in columns if isinstance(c, list)]
    with without_innermost_interpreter():
        flat = level.stacked([x for xs in (grads, params, *listed) for x in xs])
        values = [level.read(x) for x in (*[c for c in columns if not isinstance(c, list)], *numbers)]
        if flat is None or any([x is None for x in values]):
            return None
        own, hypers = arguments(cut(flat, len(params)), columns, values)
        if any([isinstance(x, Tensor) for x in values]):
            found = by_member(recipe, declarations, own, hypers, apply, level.size)
        else:
            found = tuple(calculate(Variant(recipe, declarations, apply), own, hypers))
    return None if found is None else tuple(map(level.batched, found))


def cut(flat: list[Tensor], n: int) -> list[list[Tensor]]:
    """Lists of `n` tensors each, which were put one after the other."""
    return [flat[k : k + n] for k in range(0, len(flat), n)]


def arguments(lists: list[list[Tensor]], columns: list[Any], values: list[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """The gradients, the parameters and the columns, and the hyperparameters, out of all lists and all numbers in order."""
    g, p, *rest = lists
    tensors, numbers = iter(rest), iter(values)
    given = [next(tensors) if isinstance(c, list) else next(numbers) for c in columns]
    return (g, p, given), list(numbers)


def by_member(
    recipe: tuple[Any, ...],
    declarations: Sequence[LeafDeclaration],
    given: tuple[Any, ...],
    hypers: list[Any],
    apply: bool,
    size: int,
) -> tuple[Any, ...] | None:
    """The same where numbers differ from member to member, in memory that is made once for all of them."""
    grads, params, columns = given
    elements = sum([p[0].numel() for p in params])
    plain = program(recipe, apply, False, False, *declarations)
    if plain.broadcasts and (plain.length <= SHORT or (elements < LARGE and size * elements <= FEW)):
        every = Members(0, size)
        found = plain.run(*every.of(grads, params, columns), *every.numbers(hypers))
        return tuple([rearranged(x, params) if isinstance(x, (list, tuple)) else collected([x]) for x in found])
    step = 1 if elements >= LARGE else max(1, TILE // max(1, elements))
    if step > 1 and not plain.broadcasts:
        return None
    donating = program(recipe, apply, False, True, *declarations)
    new_params = room(params) if apply else params
    new_columns = [room(c) if isinstance(c, list) else c for c in columns]
    updates = new_params if apply else room(params)
    results: list[tuple[Any, ...]] = []
    for start in range(0, size, step):
        some = Members(start, min(step, size - start), alone=step == 1)
        g, p, *old = some.of(grads, params, columns)
        home = [some.rows(c) if isinstance(c, list) else x for c, x in zip(new_columns, old)]
        place = some.rows(new_params) if apply else p
        out = place if apply else some.rows(updates)
        results.append(Tiles(donating, g, p, old).fill(some.numbers(hypers), place, home, out))
    return updates, *[c if isinstance(c, list) else collected(x) for c, *x in zip(new_columns, *results)]


class Members(NamedTuple):
    """Some consecutive members of a batch."""

    start: int
    many: int
    alone: bool = False  # a single one, whose numbers are plain

    def rows(self, xs: list[Tensor]) -> list[Tensor]:
        """Of stacked tensors: a matrix with a row for each member, or a vector if it is alone."""
        if self.alone:
            return [x[self.start].view(-1) for x in xs]
        chosen = [x.narrow(0, self.start, self.many) for x in xs]
        return [x.flatten(1) if x.dim() > 1 else x[:, None] for x in chosen]

    def numbers(self, xs: list[Any]) -> list[Any]:
        """Of numbers that may differ: columns, or floats if it is alone."""
        if self.alone:
            return [x[self.start].item() if isinstance(x, Tensor) else x for x in xs]
        return [x.narrow(0, self.start, self.many)[:, None] if isinstance(x, Tensor) else x for x in xs]

    def of(self, grads: list[Tensor], params: list[Tensor], columns: list[Any]) -> list[Any]:
        """Of all that a program is given."""
        listed = [c for c in columns if isinstance(c, list)]
        rows = self.rows([x for xs in (grads, params, *listed) for x in xs])
        numbers = self.numbers([c for c in columns if not isinstance(c, list)])
        (g, p, given), _ = arguments(cut(rows, len(params)), columns, numbers)
        return [g, p, *given]


def rearranged(xs: Sequence[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Rows as stacked tensors again."""
    return [x.view(p.shape) for x, p in zip(xs, like)]


def collected(values: list[Any]) -> Any:
    """What came out for some members at a time: a number, if it is the same for all of them."""
    if any([isinstance(x, Tensor) for x in values]):
        return torch.cat([x.reshape(-1) for x in values])
    return values[0] if values.count(values[0]) == len(values) else torch.tensor(values, dtype=torch.float64)
