"""A cache of what follows from declarations, none of which it keeps alive."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Keyed(Protocol):
    """A declaration, as a key of a cache knows it."""

    key: str  # identifies the declaration; a key that held the declaration itself would keep it alive
    watched: bool  # a finalizer drops what follows from this declaration when it is freed


DECLARATIONS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
"""All declared transforms by their keys. To `torch.compile` these are constants, and the objects are not (2.9)."""


class DeclarationCache(Generic[V]):
    """At most `size` entries; the oldest is dropped for a new one, and an entry is dropped with any of its declarations."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: dict[Hashable, V] = {}
        self.declarations: dict[Hashable, tuple[str, ...]] = {}
        self.lock = threading.RLock()  # a finalizer may run while an entry is added
        CACHES.add(self)

    def keep(self, key: Hashable, made: V, declarations: Iterable[Keyed]) -> None:
        """Keep an entry for as long as all of these declarations exist."""
        declarations = list(declarations)
        with self.lock:
            self.drop(key)
            while len(self.entries) >= self.size:
                self.drop(next(iter(self.entries)))
            self.entries[key], self.declarations[key] = made, tuple([d.key for d in declarations])
        for d in declarations:
            if not d.watched:
                d.watched = True
                weakref.finalize(d, forget, d.key).atexit = False

    def drop(self, key: Hashable) -> None:
        """Drop an entry, if it is there."""
        self.entries.pop(key, None)
        self.declarations.pop(key, None)


DERIVED = 32
"""So many are held of what is derived of a declaration or an operation; more live as long as somebody uses them."""


class Shared(Generic[K, V]):
    """One value for each key for as long as anybody holds it; the `size` that were asked for last are held here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.living: weakref.WeakValueDictionary[K, V] = weakref.WeakValueDictionary()
        self.recent: dict[K, V] = {}
        self.lock = threading.RLock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of this key, which is made if there is none."""
        found = self.recent.get(key)
        if found is not None and len(self.recent) < self.size:
            return found  # none is to be dropped yet, so their order does not matter
        with self.lock:
            found = self.living.get(key)
            if found is None:
                found = self.living[key] = make()
            self.recent.pop(key, None)
            self.recent[key] = found
            while len(self.recent) > self.size:
                del self.recent[next(iter(self.recent))]
        return found


CACHES: weakref.WeakSet[DeclarationCache[Any]] = weakref.WeakSet()
"""All of them: a declaration that is freed is forgotten by each."""


def forget(declaration: str) -> None:
    """Drop what follows from a declaration that was freed, by its key."""
    for cache in list(CACHES):
        with cache.lock:
            for key in list(cache.declarations):  # a copy: another declaration may be freed meanwhile, in this thread, too
                if declaration in cache.declarations.get(key, ()):
                    cache.drop(key)
