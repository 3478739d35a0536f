"""Apply a transform to some of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from purestep.engine import Link
from purestep.transform import Composite, Transform


class Masked(Composite):
    """A transform under a mask; made with `masked`."""

    __slots__ = ()

    def _links(self) -> tuple[Link, ...]:
        (inner,), (mask,) = self.children, self.context
        return tuple([Link(link.transform, (*link.masks, mask)) for link in inner.links])

    def _split(self, state: Any) -> list[Any]:
        return self.children[0]._split(state)

    def _join(self, states: Any) -> Any:
        return self.children[0]._join(states)


def masked(transform: Transform, mask: Callable[[str, Tensor], bool] | Any) -> Transform:
    """Apply a transform where the mask is True; everywhere else the updates pass through unchanged.

    Args:
        transform: any transform; where the mask is False its state is None.
        mask: a function `(path, param) -> bool`, or a pytree of bools shaped like the parameters. A path is dotted, as the
            names of `model.named_parameters()` are. The function must depend on nothing that a step changes.

    Raises:
        TypeError: (when used) the mask is not a bool for some parameter; the error names its path.

    >>> import torch, purestep as ps
    >>> opt = ps.masked(ps.scale(-1.0), lambda path, p: path.endswith("weight"))
    >>> params = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    >>> grads = {"weight": torch.ones(1), "bias": torch.ones(1)}
    >>> opt.update(grads, opt.init_state(params), params)[0]
    {'weight': tensor([-1.]), 'bias': tensor([1.])}
    """
    if not isinstance(transform, Transform):
        raise TypeError(f"masked takes a transform and a mask, but the first argument is {transform!r}.")
    return Masked((transform,), (mask,))
