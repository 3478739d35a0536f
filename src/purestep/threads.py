"""Small tensors on one thread.

Kernels for a CPU share out every tensor among the threads, however small it is, which costs about as much as to update
`SERIAL` elements.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SERIAL = 4096
"""Up to this many elements a tensor is updated sooner by one thread."""


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
    put(1)
    try:
        yield
    finally:
        put(threads)
