"""The steps of a training run after its first one.

`Transform.step` takes trees apart, looks at every tensor, and puts trees together again, which on small networks costs more
than the step. Within a loop that calls it with what it has returned there is nothing new to be found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.masks import MaskCache, select
from purestep._core.torch_api import tree_leaves
from purestep._engine.boundary import columns_of, trees_of
from purestep._engine.plan import ParamSlice
from purestep._engine.run import Inputs, choose, run_chain
from purestep._executors.task import Env, Ownership
from purestep.transform import Transform


class Loop:
    """A transform with the parameters and the state that it has returned, as lists."""

    def __init__(self, opt: Transform, state: Any, params: list[Tensor], spec: tree.Spec) -> None:
        self.opt, self.params, self.spec = opt, params, spec
        self.states = columns_of(opt.plan, opt._split(state), spec)
        self.groups = [ParamSlice(opt.plan, range(len(params)))]

    @classmethod
    def of(cls, opt: Transform, grads: Any, state: Any, params: Any) -> Loop | None:
        """None if every step has something new to tell the transform, or some parameters may be left out."""
        if opt.plan.extras:
            return None
        leaves, spec = tree.flatten(params)
        tensors = [*leaves, *tree.flatten_like(grads, spec, "grads")]
        plain = all([isinstance(x, Tensor) and x.layout is torch.strided for x in tensors])
        return cls(opt, state, leaves, spec) if plain else None

    def step(self, grads: Any) -> Any:
        """The new parameters."""
        gradients, params, opt = tree.flatten_like(grads, self.spec, "grads"), self.params, self.opt
        kept = [c if isinstance(c, list) else tree_leaves(c) for s in self.states for c in s]
        memo: MaskCache = {}
        inputs = Inputs(gradients, params, self.states, lambda masks: select(masks, params, self.spec, memo))
        mode = choose(None, params, gradients, *kept, opt.plan.tensors)
        env = Env(mode, None, Ownership(counters=True), gradients + params)
        self.params, self.states = run_chain(self.groups, inputs, env, apply=True)
        return tree.unflatten(self.params, self.spec)

    def state(self) -> Any:
        """The state, as the transform returns it."""
        return self.opt._join(trees_of(self.opt.plan, self.states, self.spec))
