"""Optimistic gradient descent and Adam (Popov, 1980; Daskalakis et al., 2018): for games, whose gradients turn in circles."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper
from purestep._core.maths import Scalar, counter, where
from purestep.algorithms.adam import scale_by_adam
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.scale import direction, scale_by_learning_rate


class OptimisticState(NamedTuple):
    """The state of `scale_by_optimistic_gradient`."""

    step: Scalar  # updates so far
    prev: Tensor  # the last update that came in

    @classmethod
    def init(cls, p: Tensor) -> OptimisticState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


@leafwise(OptimisticState)
def scale_by_optimistic_gradient(
    u: Tensor, s: OptimisticState, p: Tensor, *, alpha: Hyper = 1.0, beta: Hyper = 1.0
) -> tuple[Tensor, OptimisticState]:
    r"""Add to the update what it has changed by since the last: a guess at the next one.

    .. math:: u_t \leftarrow \alpha\,u_t + \beta\,(u_t - u_{t-1}), \qquad u_0 = u_1

    Args:
        alpha: :math:`\alpha`, the share of the update itself.
        beta: :math:`\beta`, the optimism.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_optimistic_gradient(), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for g in (1.0, 3.0):
    ...     u, state = opt.update(torch.tensor([g]), state, p)
    >>> u  # 3 + (3 - 1)
    tensor([5.])

    Reference: Mokhtari et al., `A Unified Analysis of Extra-gradient and Optimistic Gradient Methods for Saddle Point
    Problems <https://arxiv.org/abs/1901.08511>`_, 2020.
    """
    change = where(s.step == 0, 0.0, u - s.prev)
    return alpha * u + beta * change, OptimisticState(s.step + 1, u)


def optimistic_gradient_descent(
    lr: Hyper = 1e-3, alpha: Hyper = 1.0, beta: Hyper = 1.0, *, maximize: bool = False
) -> Transform:
    r"""Optimistic gradient descent: it converges to saddle points where gradient descent goes around them.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\alpha\,g_t + \beta\,(g_t - g_{t-1})\bigr), \qquad g_0 = g_1

    The numbers are those of optax. For a minimum over some parameters and a maximum over others, turn the gradients of the
    latter around, or give them an optimizer with `maximize`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        alpha: the share of the gradient itself.
        beta: the optimism.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> def distance(opt):  # from the saddle point of x * y, which is at 0
    ...     p = torch.tensor([1.0, 1.0])
    ...     state = opt.init_state(p)
    ...     for _ in range(100):
    ...         x, y = p
    ...         p, state = opt.step(torch.stack([y, -x]), state, p)
    ...     return p.norm()
    >>> distance(ps.sgd(lr=0.5)) > 1e4, distance(ps.optimistic_gradient_descent(lr=0.5)) < 1e-4
    (tensor(True), tensor(True))

    Reference: Popov, `A modification of the Arrow-Hurwicz method for search of saddle points
    <https://doi.org/10.1007/BF01141092>`_, 1980; Mokhtari et al., `A Unified Analysis of Extra-gradient and Optimistic
    Gradient Methods for Saddle Point Problems <https://arxiv.org/abs/1901.08511>`_, 2020.
    """
    return chain(direction(maximize), scale_by_optimistic_gradient(alpha=alpha, beta=beta), scale_by_learning_rate(lr))


def optimistic_adam(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    alpha: Hyper = 1.0,
    beta: Hyper = 1.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Optimistic Adam: Adam for games, such as the training of a generative adversarial network.

    .. math::
        r_t &= \mathrm{adam}(g_t) \\
        p_t &= p_{t-1} - \eta\,\bigl(\alpha\,r_t + \beta\,(r_t - r_{t-1})\bigr), \qquad r_0 = r_1

    with :math:`\mathrm{adam}` as in `scale_by_adam`. At the defaults it is the paper's algorithm 1, whose step is
    :math:`-2 \eta r_t + \eta r_{t-1}`. It is optax's ``optimistic_adam_v2(nesterov=False)``; in its ``optimistic_adam`` the
    optimism is not multiplied by the learning rate.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        alpha: the share of Adam's step.
        beta: the optimism.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.optimistic_adam(lr=0.1), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for g in (1.0, -1.0):
    ...     p, state = opt.step(torch.tensor([g]), state, p)
    >>> p  # 0.9 - 0.1 * (2 * -0.0526 - 1): the mean of 1 and -1 is nearly 0, which is 1 less than it was
    tensor([1.0105])

    Reference: Daskalakis et al., `Training GANs with Optimism <https://arxiv.org/abs/1711.00141>`_, 2018.
    """
    adam, optimism = scale_by_adam(betas=betas, eps=eps), scale_by_optimistic_gradient(alpha=alpha, beta=beta)
    return chain(direction(maximize), adam, optimism, scale_by_learning_rate(lr))
