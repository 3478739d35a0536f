"""Small tensors on one thread.

Kernels for a CPU share out every tensor among the threads, however small it is, which costs about as much as to update
`SERIAL` elements.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SERIAL = 4096
"""Up to this many elements a tensor is updated sooner by one thread."""

FEW = 4
"""So many small tensors at most, among larger ones, are not worth a call of their own."""


def _openmp() -> Callable[[int], Any] | None:
    """`omp_set_num_threads` of the OpenMP that torch uses, or None if it is not to be found.

    It sets the number of threads of the calling thread alone; `torch.set_num_threads` would set that of all which begin
    meanwhile.
    """
    loaded = Path("/proc/self/maps")
    found = re.findall(r"/\S*lib\w*omp\S*", loaded.read_text()) if loaded.exists() else []
    found += map(str, (Path(torch.__file__).parent / "lib").glob("lib*omp*"))
    threads = torch.get_num_threads()
    for path in dict.fromkeys(found):
        try:
            put: Callable[[int], Any] = ctypes.CDLL(path).omp_set_num_threads
        except (OSError, AttributeError):
            continue
        put(threads + 1)
        same = torch.get_num_threads() == threads + 1
        put(threads)
        if same:
            return put
    return None


OPENMP = _openmp()


@contextmanager
def one_thread(put: Callable[[int], Any]) -> Iterator[None]:
    """One thread, for what the calling thread does meanwhile; `put` is `OPENMP`."""
    threads = torch.get_num_threads()
    try:
        put(1)
        yield
    finally:
        put(threads)


class Sizes(NamedTuple):
    """Which of some tensors are small, and whether none or all of them are to be updated by one thread."""

    small: list[bool]
    none: bool
    all: bool

    @classmethod
    def of(cls, params: list[Tensor]) -> Sizes:
        """The sizes of these tensors, which are all on one device."""
        small = [n <= SERIAL for n in map(Tensor.numel, params)] if params[0].is_cpu else []
        return cls(small, sum(small) <= min(FEW, len(params) - 1), all(small))


def divided(run: Callable[..., None]) -> Callable[..., None]:
    """A kernel that is given lists of tensors, first the parameters, and is called for the small ones with one thread.

    Whatever else it is given is passed on, but for dictionaries, in which lists are looked for too. `sizes` are those of the
    parameters, for whoever knows them.
    """

    def call(params: list[Tensor], *given: Any, sizes: Sizes | None = None) -> None:
        put, threads = OPENMP, torch.get_num_threads()
        if put is None or threads == 1 or (sizes := sizes or Sizes.of(params)).none:
            run(params, *given)
            return
        small = [params, *given]
        if not sizes.all:
            large = [not x for x in sizes.small]
            run(*[_where(x, large) for x in small])
            small = [_where(x, sizes.small) for x in small]
        try:
            put(1)
            run(*small)
        finally:
            put(threads)

    return call


def _where(x: Any, chosen: list[bool]) -> Any:
    """Some of a list, or of the lists in a dictionary."""
    if isinstance(x, dict):
        return {name: _where(y, chosen) for name, y in x.items()}
    return list(compress(x, chosen)) if isinstance(x, list) else x
