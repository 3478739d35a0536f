"""The counters of an optimizer: one number for each parameter, in tensors that belong to the user.

No two parameters share a counter, and a counter keeps its identity and its memory. The engine takes one tensor for all counters
that are equal (`Counters.represented`), reads it once, and returns new ones, whose values are then written into the counters
of the parameters (`Counters.write`). Counters that were made `together` follow each other in memory, and are read and written
as one vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from purestep._core.lists import first_places, put
from purestep._core.plain import plain
from purestep._core.primitives import Fields
from purestep._core.torch_api import dispatch_mode_count, foreach_copy_
from purestep._executors.flat_buffer import apart
from purestep._executors.leaf_function import STOP, outgrows, stored


def together(values: Sequence[Tensor]) -> list[Tensor]:
    """New 0-d tensors with these values, which are of one dtype and device, one after the other in memory."""
    return apart(torch.stack([x.detach().reshape(()) for x in values]), [torch.Size(())] * len(values))


def spans(counters: Sequence[Tensor]) -> list[Tensor]:
    """The memory of these counters as vectors: one for each run of counters that follow each other in memory.

    The counters have one element each, and one dtype.
    """
    width = counters[0].element_size()
    addresses = list(map(Tensor.data_ptr, counters))
    n = len(addresses)
    if addresses == list(range(addresses[0], addresses[0] + width * n, width)) and holds(counters[0], n):
        return [counters[0].as_strided((n,), (1,))]
    found: list[Tensor] = []
    start = 0
    for k in range(1, n + 1):
        if k == n or addresses[k] != addresses[k - 1] + width or not holds(counters[start], k + 1 - start):
            found.append(counters[start].as_strided((k - start,), (1,)))
            start = k
    return found


def holds(counter: Tensor, n: int) -> bool:
    """Whether the storage of a counter has room for `n` elements from there on: else its neighbour is another storage."""
    return (counter.storage_offset() + n) * counter.element_size() <= counter.untyped_storage().nbytes()


def ordinary(counters: Sequence[Any]) -> bool:
    """Whether these are ordinary tensors of one element and one dtype, on the CPU."""
    dtype = counters[0].dtype
    return all(
        [type(x) is Tensor and x.is_cpu and x.numel() == 1 and x.dtype is dtype and x.layout is torch.strided for x in counters]
    )


def traced() -> bool:
    """Whether operations are recorded, so that no value may be read."""
    return torch.compiler.is_compiling() or dispatch_mode_count() > 0


class Known(NamedTuple):
    """What is known of a counter until its version changes."""

    version: int
    value: Any  # equal where counters are equal


class Counters:
    """The counters of one optimizer. Those on a device are read once; afterwards it is remembered which are equal."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def represented(self, counters: list[Any]) -> list[Any]:
        """The same list, with the first of equal counters in the place of the others. `None` is no counter."""
        found = [x for x in counters if x is not None]
        if len(found) < 2 or traced():
            return counters
        if ordinary(found):
            values = list(itertools.chain.from_iterable([x.tolist() for x in spans(found)]))
            if values.count(values[0]) == len(counters):
                return found[:1] * len(counters)
        else:
            values = self._values(found)
        first: dict[Any, Tensor] = {}
        for x, value in zip(found, values):
            first.setdefault((value, x.dtype, x.device), x)
        representatives = iter([first[value, x.dtype, x.device] for x, value in zip(found, values)])
        return [None if x is None else next(representatives) for x in counters]

    def write(self, counters: list[Any], given: list[Any], news: list[Any]) -> None:
        """Write what the engine returned for `given`, which `represented` made of `counters`, into these."""
        changed = [(x, y) for x, old, y in zip(counters, given, news) if y is not old]
        if not changed:
            return
        olds, values = [x for x, _ in changed], [y.detach() for _, y in changed]
        same = all([y is changed[0][1] for _, y in changed])
        if any([y.dtype is torch.float64 for y in (values[:1] if same else values)]):
            widen(olds, values)
        if same and not traced() and ordinary(olds):
            for x in spans(olds):
                x.fill_(values[0])
            return
        if len(olds) > 1 and not olds[0].is_cpu and not traced() and plain(olds, values):
            foreach_copy_(olds, values)  # one launch, where a loop is one for each parameter
        else:
            for x, y in zip(olds, values):
                x.copy_(y)
        if not traced() and not ordinary(olds):
            self._written(olds, [id(y) for _, y in changed])

    # -- on a device

    def known(self) -> tuple[list[Tensor], list[Any]]:
        """The counters on a device that have been read or written, and what tells them apart now."""
        counters: list[Tensor] = [] if traced() else list(self._known.keys())
        return counters, self._values(counters)

    def restored(self, before: tuple[list[Tensor], list[Any]], after: tuple[list[Tensor], list[Any]]) -> None:
        """One flag for all counters has set them back, or not: remember that those are equal that were equal both times."""
        serial, now = object(), dict(zip(map(id, after[0]), after[1]))
        counters = [x for x in before[0] if id(x) in now]
        olds = dict(zip(map(id, before[0]), before[1]))
        self._remember(counters, [(serial, olds[id(x)], now[id(x)]) for x in counters])

    def _values(self, counters: list[Tensor]) -> list[Any]:
        """What tells these counters apart. The device is waited for only where something else has written to them."""
        found: list[Any] = []
        for x in counters:
            known = self._known.get(x)
            found.append(None if known is None or known.version != x._version else known.value)
        if None not in found:
            return found
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return list(map(id, counters))
        values = [x.item() for x in counters]
        self._remember(counters, values)
        return values

    def _written(self, counters: list[Tensor], values: list[Any]) -> None:
        """Remember that counters with the same one of `values` are equal, and different from all others."""
        serial = object()
        self._remember(counters, [(serial, x) for x in values])

    def _remember(self, counters: list[Tensor], values: list[Any]) -> None:
        for x, value in zip(counters, values):
            self._known[x] = Known(x._version, value)


def widen(counters: Sequence[Tensor], news: Sequence[Tensor]) -> None:
    """Give those float32 counters that the engine has returned as float64 memory of that dtype.

    They stay the tensors that they are: a user may hold them.
    """
    grown = [x for x, y in zip(counters, news) if x.dtype is torch.float32 and y.dtype is torch.float64]
    if grown and not traced():
        for x, y in zip(grown, together([x.to(torch.float64) for x in grown])):
            x.data = y


def stopped(counters: Sequence[Sequence[Tensor]], counts: Sequence[float]) -> bool:
    """Whether one of these counters cannot count on in its dtype; `counts` are what they say."""
    return any([count >= STOP and column[0].dtype is torch.float32 for column, count in zip(counters, counts)])


class CounterWrite(NamedTuple):
    """A counter's new value, of some of the parameters."""

    link: int
    field: int
    rows: Sequence[int] | None  # None for all
    value: Any


def commit(writes: Sequence[CounterWrite], states: list[Any], fields: Sequence[Fields], in_place: bool) -> None:
    """Store new counters in the states: one tensor for all parameters that agree, in place if no one else holds it."""
    if in_place and all([w.rows is None for w in writes]):  # all parameters share one already
        grown: dict[int, Tensor] = {}
        for i, f, _, x in writes:
            column = states[i][f]
            counter = column[0]
            if isinstance(x, Tensor):
                counter.copy_(x)
            elif x > STOP and outgrows(counter, x):
                states[i][f] = [grown.setdefault(id(counter), stored(counter, x))] * len(column)
            else:
                counter.fill_(x)
        return
    made: dict[Any, Tensor] = {}
    olds: list[Any] = []
    for i, f, rows, _ in writes:
        olds.append(states[i][f][0 if rows is None else rows[0]])
    places = first_places(olds) if len(olds) > 1 else [0]
    for (i, f, rows, x), old, place in zip(writes, olds, places):
        column = states[i][f]
        value: Any = x
        if isinstance(x, Tensor):  # buckets of the same counter count to the same number
            same = [k for k, w in enumerate(writes) if w.value is x]
            value = ("step", place) if f == fields[i].step else ("other", same[0])
        key = (value, f, old.dtype, old.device)
        new = made.get(key)
        if new is None:
            new = made[key] = stored(old, x)
        states[i][f] = [new] * len(column) if rows is None else put(column, rows, [new] * len(rows))
