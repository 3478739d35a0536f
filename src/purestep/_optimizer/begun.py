"""State before the first step.

The state of a parameter exists from construction, so that it can be saved and loaded, but nothing has been computed with it. At
the parameter's first step, what depends on values that may have changed in between (of the parameter, or of options) is
computed again, in the same tensors; what a user has written into it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core import sharded
from purestep._core.plain import plain
from purestep._core.primitives import Primitive, fields_of, fresh_state, fresh_whole_state
from purestep._core.torch_api import tree_map
from purestep._core.values import same
from purestep._engine.counters import traced
from purestep.transform import Transform


class Begun(NamedTuple):
    """What was known of a parameter when its state was made."""

    kind: Any  # what the state is made like: see `kind`
    fields: dict[str, tuple[Tensor, int]]  # each tensor of the state, and its version
    options: dict[str, Any]  # of the state's first values, by the name of the first field of each transform

    @classmethod
    def of(cls, p: Tensor, state: Mapping[str, Any], options: dict[str, Any]) -> Begun:
        """What is to be remembered of a state that was just made."""
        return cls(kind(p), {name: (x, x._version) for name, x in state.items() if isinstance(x, Tensor)}, options)

    def own(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those tensors of a state that are still what the optimizer made: neither replaced nor written to."""
        return {n: x for n, (x, _) in self.made(state).items()}

    def made(self, state: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
        """The same, each with its version."""
        return {n: (x, version) for n, (x, version) in self.fields.items() if state.get(n) is x and x._version == version}

    def again(self) -> Begun:
        """The same of copies of these tensors, whose versions have begun anew."""
        return self._replace(fields={n: (x, x._version) for n, (x, _) in self.fields.items()})


def kind(p: Tensor) -> Any:
    """What a parameter's state is made like."""
    return type(p), p.dtype, p.device, p.shape, p.stride(), sharded.placed(p)


def options_of(value: Primitive) -> dict[str, Any]:
    """The hyperparameters that the first state of a leafwise transform depends on, as they are now."""
    chosen = {name: value.arguments[name] for name in value.declaration.init_names}
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, chosen)


def options_in(transform: Transform) -> dict[str, Any]:
    """The hyperparameters that first states depend on, by the name of the first field of each state."""
    links = [(names, link.transform) for names, link in zip(transform.plan.keys, transform.links)]
    return {names[0]: options_of(value) for names, value in links if names and value.declaration.init_names}


class Dependence:
    """Says which first states depend on the values of parameters. Each declaration is probed once."""

    def __init__(self) -> None:
        self._leafwise: dict[Any, bool] = {}
        self._whole: dict[Any, set[int]] = {}

    def leafwise(self, value: Primitive, p: Tensor) -> bool:
        """Whether the first state of a leafwise transform depends on the values of the parameter, and not only on its kind."""
        found = self._leafwise.get(value.declaration)
        if found is None:
            if traced() or p.is_meta:
                return True
            zeros, ones = (fresh_state(value, x) for x in probes(p.detach()))
            pairs = [(x, y) for x, y in zip(zeros, ones) if isinstance(x, Tensor) and isinstance(y, Tensor)]
            found = any([x.shape != y.shape or not torch.equal(x, y) for x, y in pairs])
            self._leafwise[value.declaration] = found
        return found

    def whole(self, value: Primitive, p: Tensor) -> set[int]:
        """The fields of the first state of a whole transform that depend on the values of the parameters, by their number."""
        found = self._whole.get(value.declaration)
        if found is None:
            if traced() or p.is_meta:
                return set(range(len(fields_of(value).names)))
            zeros, ones = (list(fresh_whole_state(value, [x])) for x in probes(p.detach()))
            found = self._whole[value.declaration] = {f for f, (x, y) in enumerate(zip(zeros, ones)) if not same(x, y)}
        return found


def probes(p: Tensor) -> list[Tensor]:
    """Two parameters like this one, with different values.

    Those of a sharded one are small plain tensors: processes would have to talk to compare others of its kind.
    """
    if not plain([p]):
        p = torch.empty([min(n, 2) for n in p.shape], dtype=p.dtype, device=p.device)
    return [torch.full_like(p, x) for x in (0.0, 1.0)]


def renewed(old: Any, new: Any) -> Any:
    """`new`, in the memory of `old` where it fits."""
    same = isinstance(old, Tensor) and isinstance(new, Tensor) and type(old) is type(new)
    if not same or old.requires_grad or new.requires_grad or layout(old) != layout(new):
        return new
    old.copy_(new)
    return old


def layout(x: Tensor) -> Any:
    """What two tensors must agree in for one to take the other's place."""
    return x.shape, x.dtype, x.device, x.stride() if x.layout is torch.strided else x.layout
