"""signSGD and Signum (Bernstein et al., 2018): the sign of the gradient, and of its running mean."""

from __future__ import annotations

from purestep._core.hyper import Hyper
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.ema import ema
from purestep.transforms.gradients import sign
from purestep.transforms.scale import direction, scale_by_learning_rate


def sign_sgd(lr: Hyper = 1e-3, weight_decay: Hyper = 0.0, *, maximize: bool = False) -> Transform:
    r"""SignSGD: every coordinate moves by the learning rate, against the sign of its gradient.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{sign}(g_t) + \lambda p_{t-1}\bigr)

    Where the gradient is exactly 0 the coordinate stays. The numbers are those of optax, which has no decay.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.sign_sgd(lr=0.1), torch.zeros(3)
    >>> opt.step(torch.tensor([-300.0, 0.0, 0.2]), opt.init_state(p), p)[0]
    tensor([ 0.1000,  0.0000, -0.1000])

    Reference: Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
    <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    return chain(direction(maximize), sign(), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))


def signum(lr: Hyper = 1e-3, momentum: Hyper = 0.9, weight_decay: Hyper = 0.0, *, maximize: bool = False) -> Transform:
    r"""Signum: every coordinate moves by the learning rate, against the sign of its gradient's running mean.

    .. math::
        m_t &= \mu\,m_{t-1} + (1 - \mu)\,g_t \\
        p_t &= p_{t-1} - \eta\,\bigl(\mathrm{sign}(m_t) + \lambda p_{t-1}\bigr)

    It is `lion` with equal betas. The paper's algorithm has no decay; here it is decoupled, as in `adamw`. In a chain, the
    hyperparameter that holds :math:`\mu` is called ``decay``: see `ema`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu`, the decay rate of the running mean, in [0, 1).
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.signum(lr=0.1), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for g in (3.0, -2.0):
    ...     p, state = opt.step(torch.tensor([g]), state, p)
    >>> p  # the mean is still above 0
    tensor([-0.2000])

    Reference: Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems
    <https://arxiv.org/abs/1802.04434>`_, 2018, algorithm 2.
    """
    mean = ema(momentum, debias=False)
    return chain(direction(maximize), mean, sign(), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
