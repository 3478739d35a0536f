"""Multiply the updates by a number, or turn them around."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform


@leafwise(sparse="rows")
def scale(u: Tensor, p: Tensor, factor: Hyper) -> Tensor:
    r"""Multiply the updates by a number: :math:`u \leftarrow c\,u`.

    Args:
        factor: :math:`c`, any number, a 0-d tensor or a schedule.

    >>> import torch, purestep as ps
    >>> opt = ps.scale(-0.5)
    >>> p = torch.tensor([1.0, 2.0])
    >>> opt.update(torch.tensor([2.0, 4.0]), opt.init_state(p), p)[0]
    tensor([-1., -2.])
    """
    return u * factor


def scale_by_schedule(schedule: Callable[[Any], Any]) -> Transform:
    r"""Multiply the updates by what a schedule says: :math:`u_t \leftarrow c_t\,u_t`, where :math:`t = 0, 1, \dots`

    It is `scale`, which takes schedules as every transform does, and like it does not turn the updates around: a learning rate
    belongs in `scale_by_learning_rate`. Each parameter counts its own updates.

    Args:
        schedule: a function of the number of the update, such as those of `purestep.schedules`.

    Raises:
        TypeError: it is not a function.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_schedule(lambda t: 0.5**t), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     u, state = opt.update(torch.ones(1), state, p)
    >>> u, state.step
    (tensor([0.2500]), tensor(3.))
    """
    if not callable(schedule) or isinstance(schedule, (type, Tensor)):
        raise TypeError(f"scale_by_schedule takes a schedule (step -> value), but got {schedule!r}. For a number use scale.")
    return scale(schedule)


@leafwise(sparse="rows")
def scale_by_learning_rate(u: Tensor, p: Tensor, lr: NonNegative) -> Tensor:
    r"""Multiply the updates by the negative learning rate, :math:`u \leftarrow -\eta\,u`: a step *down* the gradient.

    It stands at the end of a chain.

    Args:
        lr: :math:`\eta \ge 0`, a number, a 0-d tensor or a schedule.

    >>> import torch, purestep as ps
    >>> opt = ps.scale_by_learning_rate(ps.schedules.linear(1.0, 0.0, total_steps=2))
    >>> p = torch.tensor([0.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.ones(1), state, p)
    >>> p  # -(1 + 1/2 + 0)
    tensor([-1.5000])
    """
    return u * -lr


@leafwise(sparse="rows")
def maximize(u: Tensor, p: Tensor) -> Tensor:
    r"""Turn the gradients around, :math:`u \leftarrow -u`, so that the rest of the chain climbs.

    It stands at the beginning of a chain.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.maximize(), ps.sgd(lr=0.1))
    >>> p = torch.tensor([1.0])
    >>> opt.step(torch.tensor([1.0]), opt.init_state(p), p)[0]
    tensor([1.1000])
    """
    return -u


def direction(maximize: bool) -> Transform:
    """What a factory with a `maximize` switch begins with."""
    return _ascend() if maximize else chain()


_ascend = maximize
