"""Stochastic gradient descent with Polyak's step (Loizou et al., 2021): as long as the loss that is left allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core.hyper import Extra, Hyper, NonNegative
from purestep._core.maths import inner, maximum, minimum, multiply, where
from purestep._core.primitives import EmptyState
from purestep.compose import chain
from purestep.declare import whole
from purestep.transform import Transform
from purestep.transforms.scale import direction, scale_by_learning_rate


@whole()
def scale_by_polyak(
    gs: list[Tensor],
    s: EmptyState,
    ps: list[Tensor],
    value: Extra,
    *,
    f_min: Hyper = 0.0,
    max_learning_rate: NonNegative = 1.0,
    eps: NonNegative = 0.0,
    positive: bool = False,
) -> tuple[Any, EmptyState]:
    r"""Multiply the gradients by the loss that is left over their squared norm.

    .. math:: u_t = \min\Bigl(\eta_{\max}, \frac{f(p_{t-1}) - f_{\min}}{\lVert g_t \rVert_2^2 + \epsilon}\Bigr)\,g_t

    The norm is that of all parameters together.

    It asks for `value`, the loss, at each `update` and `step`; an optimizer of `purestep.optim` takes it from the closure.

    Args:
        value: the loss, a 0-d tensor or a number.
        f_min: :math:`f_{\min}`, a lower bound of the loss: 0 for a model that can fit its data.
        max_learning_rate: :math:`\eta_{\max} \ge 0`.
        eps: :math:`\epsilon \ge 0`.
        positive: take the factor to be 0 where the loss is below `f_min` (optax's variant ``"sps+"``), instead of climbing.

    Raises:
        TypeError: (from `update`) `value` is missing.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_polyak(), torch.tensor([3.0, 4.0])
    >>> opt.update(2 * p, opt.init_state(p), p, value=(p**2).sum())[0]  # 25 / 100 times the gradient
    tensor([1.5000, 2.0000])

    Reference: Loizou et al., `Stochastic Polyak Step-size for SGD <https://arxiv.org/abs/2002.10542>`_, 2021.
    """
    square = inner(gs, gs) + eps
    gap = torch.as_tensor(value).to(square) - f_min
    gap = maximum(gap, 0.0) if positive else gap
    none = square == 0
    factor = minimum(gap / torch.where(none, 1.0, square), max_learning_rate)
    return multiply(gs, torch.where(none, where(gap > 0, max_learning_rate, 0.0), factor)), s


def polyak_sgd(
    max_learning_rate: Hyper = 1.0,
    f_min: Hyper = 0.0,
    eps: Hyper = 0.0,
    *,
    lr: Hyper = 1.0,
    positive: bool = False,
    maximize: bool = False,
) -> Transform:
    r"""Gradient descent with Polyak's step, which needs the loss instead of a learning rate.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{polyak}(g_t)

    with :math:`\mathrm{polyak}` as in `scale_by_polyak`. It asks for `value`, the loss, at each `update` and `step`; an
    optimizer of `purestep.optim` takes it from the closure.

    The numbers are those of `optax.polyak_sgd`, but for `lr`: its ``scaling`` multiplies the gradients before their norm is
    taken.

    Args:
        max_learning_rate: the longest step, relative to the gradient; at least 0.
        f_min: a lower bound of the loss (if `maximize`, of the negative one).
        eps: added to the squared norm; at least 0.
        lr: :math:`\eta \ge 0`, what steps are multiplied by.
        positive: make no step where the loss is below `f_min`, instead of climbing.
        maximize: climb instead of descending; `value` is then the negative of what is climbed.

    Raises:
        ValueError: a number out of its range.
        TypeError: (from `update`) `value` is missing.

    >>> import torch, purestep as ps
    >>> opt, p = ps.polyak_sgd(), torch.tensor([3.0, 4.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(2 * p, state, p, value=(p**2).sum())
    >>> p  # halved each time
    tensor([0.3750, 0.5000])

    Reference: Loizou et al., `Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast Convergence
    <https://arxiv.org/abs/2002.10542>`_, 2021.
    """
    polyak = scale_by_polyak(f_min=f_min, max_learning_rate=max_learning_rate, eps=eps, positive=positive)
    return chain(direction(maximize), polyak, scale_by_learning_rate(lr))
