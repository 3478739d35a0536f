"""Between the state of an optimizer in torch's form and the pure state of a transform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.lists import put
from purestep._core.torch_api import tree_map_only
from purestep._engine.boundary import columns_of, trees_of
from purestep._engine.plan import ParamSlice
from purestep._executors.leaf_function import stored
from purestep._optimizer.checkpoint import shown
from purestep._optimizer.optimizer import Optimizer
from purestep.algorithms.lbfgs import LBFGS, lbfgs
from purestep.transform import Transform

PyTree = Any

UNSAID = frozenset({"step", "al"})
"""Fields of torch's that say nothing of an algorithm: a counter, and what its L-BFGS computes anew at each step."""


class Bridge(NamedTuple):
    """An optimizer around a transform, whose state is that of `torch.optim`, and what leads from there to the pure state."""

    transform: Transform
    optimizer: Optimizer
    spec: tree.Spec
    rows: list[int]  # the leaves that are parameters

    @classmethod
    def over(cls, transform: Transform, params: PyTree) -> Bridge:
        """For these parameters, of which nothing is changed."""
        leaves, spec = tree.flatten(params)
        paths = spec.paths()
        rows = [k for k, p in enumerate(leaves) if p is not None]
        named = [(paths[k], trained(leaves[k])) for k in rows]
        first = transform.links[0].transform
        if first.declaration is lbfgs.declaration:  # type: ignore[attr-defined]
            options = {name: x for name, x in first.arguments.items() if name != "maximize"}
            return cls(transform, LBFGS(named, **options), spec, rows)
        optimizer = Optimizer(named, transform)
        if len(optimizer.param_groups) != 1:
            raise TypeError(
                f"A partition has a state for each part: convert that of each part alone, not that of {transform!r}."
            )
        return cls(transform, optimizer, spec, rows)

    def ids(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The numbers that the parameters have in the groups of a state dict: by their names, or by their order."""
        ids = [k for g in groups for k in g["params"]]
        if len(ids) != len(self.rows):
            raise ValueError(
                f"The optimizer has {len(ids)} parameters, but params has {len(self.rows)}. They must be the same."
            )
        paths = [self.spec.paths()[k] for k in self.rows]
        names = [name for g in groups for name in g.get("param_names", ())]
        return [dict(zip(names, ids))[path] for path in paths] if sorted(names) == sorted(paths) else ids

    def state(self, states: Sequence[Mapping[str, Any]]) -> Any:
        """The pure state that is made of those of the parameters, in order, as `torch.optim` names their fields."""
        for k, own in zip(self.rows, states):
            if not isinstance(own, Mapping):
                raise ValueError(
                    f"The state of {self.spec.paths()[k]!r} must be a dict of its fields by name, but is {shown(own)}."
                )
        saved = self.optimizer.state_dict()
        saved["state"] = dict(enumerate(tree_map_only(Tensor, copied, list(map(dict, states)))))
        self.optimizer.load_state_dict(saved)
        (group,), plan = self.optimizer.param_groups, self.transform.plan
        slices = [ParamSlice(plan, range(len(self.rows)))]
        with torch.no_grad():
            _, columns = self.optimizer._columns(group["params"], slices, [(group, self.transform)])
        columns = self.optimizer._represented(columns, plan)
        nothing: list[Any] = [None] * len(self.spec.paths())
        whole = [
            [put(nothing, self.rows, c or [None] * len(self.rows)) if leaf else c for c, leaf in zip(own, info.leaves)]
            for own, info in zip(columns, plan.fields)
        ]
        return self.transform._join(trees_of(plan, whole, self.spec))

    def check_fields(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Refuse states with fields that the transform does not have: they are another algorithm's."""
        prefix, known = self.optimizer._place.prefix, UNSAID.union(*self.transform.plan.keys)
        surplus = sorted(
            {str(n) for own in states for n, x in own.items() if x is not None and str(n).removeprefix(prefix) not in known}
        )
        if surplus:
            names = ", ".join(map(repr, surplus))
            raise ValueError(
                f"The optimizer's state has {names}, which {self.transform!r} does not have: it is another algorithm's."
            )

    def adam(self, counts: Sequence[Any], means: Sequence[Any], squares: Sequence[Any]) -> Any:
        """The pure state of an Adam with these counters and moments, which may be arrays."""
        return self.state(
            [{"step": number(n), "exp_avg": tensor(m), "exp_avg_sq": tensor(v)} for n, m, v in zip(counts, means, squares)]
        )

    def states(self, state: Any) -> list[dict[str, Any]]:
        """The states of the parameters, in order, as `torch.optim` has them, that are made of the pure one."""
        plan = self.transform.plan
        found: list[dict[str, Any]] = [{} for _ in self.rows]
        for names, info, own in zip(plan.keys, plan.fields, columns_of(plan, self.transform._split(state), self.spec)):
            for name, leaf, c in zip(names, info.leaves, own):
                if not leaf:
                    found[0][self.optimizer._place.prefix + name] = c
                    continue
                for row, k in enumerate(self.rows):
                    if c[k] is not None:
                        found[row][name] = c[k]
        saved = self.optimizer.state_dict()
        saved["state"] = dict(enumerate(tree_map_only(Tensor, copied, found)))
        self.optimizer.load_state_dict(saved)
        made = self.optimizer.state_dict()["state"]
        return [made.get(k, {}) for k in range(len(self.rows))]

    def leaves_of(self, x: Any, name: str) -> list[Any]:
        """The leaves of a pytree like the parameters', in order."""
        leaves = tree.flatten_like(x, self.spec, name)
        return [leaves[k] for k in self.rows]


def trained(p: Tensor) -> Tensor:
    """A parameter in the same memory that an optimizer takes for one to be trained."""
    return p.detach().requires_grad_(p.is_floating_point() or p.is_complex())


def number(x: Any) -> Tensor:
    """A counter, which may be an array of one element."""
    count = tensor(x)
    if count.numel() != 1:
        raise ValueError(f"The state must have one number for a counter, but has {shown(x)}.")
    return stored(count.float().reshape(()), float(count))


def copied(x: Tensor) -> Tensor:
    """A tensor in memory of its own: both sides write to theirs."""
    return x.detach().clone()


def tensor(x: Any) -> Tensor:
    """A tensor with the values of a tensor or an array."""
    try:
        return x if isinstance(x, Tensor) else torch.tensor(x)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"The state must have a tensor or an array where it has {shown(x)}.") from error
