"""The inputs of transforms that a step's closure gives: the loss, and the loss with its gradients as a function."""

from __future__ import annotations

import operator
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from purestep._core import sharded
from purestep._core.lists import overwrite
from purestep._core.plain import plain
from purestep._core.primitives import state_type
from purestep._engine.checks import FROM_CLOSURE, check_value
from purestep._engine.plan import Plan


def closure_inputs(plan: Plan, closure: Any, loss: Any) -> dict[str, Any]:
    """What transforms ask for at each update, as far as a closure and its last value can give it.

    Raises:
        TypeError: there is no closure, or a transform asks for something else.
    """
    for link in plan.links:
        who = link.transform.declaration.name
        for name in link.transform.declaration.extras:
            if name not in FROM_CLOSURE:
                raise TypeError(
                    f"{who} needs {name}, which an optimizer cannot give it: a closure gives {' and '.join(FROM_CLOSURE)}. "
                    f"Call the transform itself: transform.step(grads, state, params, {name}=...)."
                )
            if closure is None:
                raise TypeError(
                    f"{who} needs {name}, so step needs a closure: step(closure), which clears the gradients, evaluates "
                    "the model, calls backward and returns the loss."
                )
            loss = sharded.whole(loss)
            loss = loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else loss
            check_value(loss, f"What the closure returns, the loss for {who}")
    return {name: {"value": loss, "value_and_grad": closure}[name] for name in plan.extras}


def value_and_grad(
    given: list[Tensor], params: list[Tensor], grads: list[Tensor], value: Any, value_and_grad: Callable[[], Any]
) -> Any:
    """A closure as a function of the parameters, which it leaves where it was evaluated; at `given` its value is known."""

    def evaluate(at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        if all(map(operator.is_, at, given)):
            return sharded.whole(torch.as_tensor(value).detach()), grads
        overwrite(params, at)
        with torch.enable_grad():
            loss = value_and_grad()
        overwrite(at, [p.detach() for p in params])  # a closure may have changed them, by clamping for instance
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        if not plain(found, params):
            found = sharded.alike(found, params, (), "number {}".format)
        return sharded.whole(torch.as_tensor(loss).detach()), [g.to_dense() if g.is_sparse else g for g in found]

    return evaluate


def keep_progress(error: Any, plan: Plan, shared: MutableMapping[str, Any]) -> bool:
    """Keep the state that a closure's exception brings with it, for the parameters where the closure was evaluated."""
    progress: Any = getattr(error, "progress", ())
    fields = list(progress)
    if not fields or type(progress) is not state_type(plan.links[-1].transform):
        return False
    del error.progress
    for name, x in zip(plan.keys[-1], fields):
        shared[name] = x
    return True
