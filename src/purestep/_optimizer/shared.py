"""What a whole transform keeps for all parameters together, in the state of an optimizer.

Tools that read `optimizer.state` expect parameters as its keys and nothing else. So it is in the state of one parameter, as
torch's L-BFGS has it: of the first one that is trained, under names that say what it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

PREFIX = "shared."
"""What such a field is called in a parameter's state: this and the field's name."""

NOTHING: Mapping[str, Any] = MappingProxyType({})

FORMER: Any = "shared"
"""The key in `state` that had all such fields in older checkpoints."""


class Shared(MutableMapping[str, Any]):
    """The fields that are kept for all parameters together, by their names."""

    def __init__(self, states: Any, home: Tensor | None, prefix: str, names: frozenset[str]) -> None:
        self._states, self._home, self._prefix, self._names = states, home, prefix, names

    def __getitem__(self, name: str) -> Any:
        return self._states.get(self._home, NOTHING)[self._prefix + name]

    def __setitem__(self, name: str, x: Any) -> None:
        self._states[self._home][self._prefix + name] = x

    def __delitem__(self, name: str) -> None:
        del self._states[self._home][self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        own = self._states.get(self._home, NOTHING)
        return iter([name[len(self._prefix) :] for name in own if is_shared(name, self._prefix, self._names)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))


class Place:
    """Where the fields are: looked for where they were, then in all states; the first trained parameter if they are nowhere."""

    def __init__(self, prefix: str = PREFIX, names: frozenset[str] = frozenset()) -> None:
        self.prefix = prefix
        self.names = names  # of the fields, where they have no prefix
        self.last: weakref.ref[Tensor] | None = None

    def holds(self, state: Any) -> bool:
        """Whether the fields are in this state."""
        return isinstance(state, dict) and any([is_shared(name, self.prefix, self.names) for name in state])

    def find(self, states: Mapping[Any, Any]) -> Tensor | None:
        """The parameter in whose state the fields are."""
        p = None if self.last is None else self.last()
        if p is None or not self.holds(states.get(p)):
            p = next((q for q, state in states.items() if self.holds(state)), None)
            self.last = None if p is None else weakref.ref(p)
        return p

    def of(self, states: Any, groups: list[dict[str, Any]]) -> Shared:
        """The fields, to be read and written."""
        p = self.find(states)
        return Shared(states, self.first(groups) if p is None else p, self.prefix, self.names)

    def without(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a parameter's state that are its own."""
        return {name: x for name, x in state.items() if not is_shared(name, self.prefix, self.names)}

    def first(self, groups: list[dict[str, Any]]) -> Tensor:
        """The parameter that they belong to: the first that is trained, or where they have torch's names, the first."""
        params = [p for group in groups for p in group["params"]]
        if self.names:
            return params[0]
        return next((p for p in params if p.requires_grad and not is_lazy(p)), params[0])

    def move(self, states: Any, groups: list[dict[str, Any]]) -> None:
        """Bring the fields to a parameter that is saved, if the one that has them is none."""
        p = self.find(states)
        if p is None or any([q is p and (q.requires_grad or self.names) for group in groups for q in group["params"]]):
            return
        home = self.first(groups)
        if home is not p:
            for name in [name for name in states[p] if is_shared(name, self.prefix, self.names)]:
                states[home][name] = states[p].pop(name)

    def take(self, states: dict[Any, Any]) -> dict[str, Any]:
        """Take the fields out of the states of a state dict, in which every parameter's is a dict of its own."""
        found = dict(states.pop(FORMER, {}))
        for state in states.values():
            for name in [name for name in state if is_shared(name, self.prefix, self.names)] if isinstance(state, dict) else ():
                found[name[len(self.prefix) :]] = state.pop(name)
        return found


def is_shared(name: Any, prefix: str, names: frozenset[str]) -> bool:
    """Whether a field of a parameter's state is kept for all of them."""
    return isinstance(name, str) and (name.startswith(prefix) if prefix else name in names)
