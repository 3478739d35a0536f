"""A step as a gradient scaler asks for it, through `optimizer.grad_scale` and `optimizer.found_inf`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from purestep._optimizer.selection import Contents


def unscale(params: Iterable[Tensor], scale: Tensor) -> None:
    """Divide gradients by a scale."""
    with torch.no_grad():
        for p in params:
            if p.grad is not None:
                p.grad.div_(scale.to(p.grad.device).reshape(()))


class Snapshot:
    """Parameters with a gradient, and the state of all parameters, as they are before a step that may be taken back."""

    def __init__(self, contents: Contents) -> None:
        self._state = contents.state
        states = [(p, dict(contents.state[p])) for p in contents.params if p in contents.state]
        self._params = [(p, p.detach().clone()) for p in contents.params if p.grad is not None]
        self._fields = [(p, {name: x.clone() for name, x in own.items() if isinstance(x, Tensor)}) for p, own in states]

    @torch.no_grad()
    def restore(self, flag: Tensor) -> None:
        """Take the step back where the flag is set, without waiting for the device that holds it."""
        for p, x in self._params:
            p.copy_(torch.where(flag.to(p.device), x, p))
        for p, own in self._fields:
            for name, x in own.items():
                new: Any = self._state[p].get(name)
                if isinstance(new, Tensor):
                    new.copy_(torch.where(flag.to(x.device), x, new))
