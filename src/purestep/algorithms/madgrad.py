"""MADGRAD (Defazio & Jelassi, 2021): dual averaging with momentum, and cube roots in the place of square roots."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Fraction, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, maximum, root, where
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction


class MadgradState(NamedTuple):
    """The state of `scale_by_madgrad`."""

    step: Scalar  # k: updates so far
    grad_sum_sq: Tensor  # nu: weighted sum of the squared gradients
    s: Tensor  # weighted sum of the gradients
    x0: Tensor  # the initial parameters

    @classmethod
    def init(cls, p: Tensor) -> MadgradState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p), p.clone())


@leafwise(MadgradState)
def scale_by_madgrad(
    g: Tensor, s: MadgradState, p: Tensor, lr: NonNegative = 1e-2, *, momentum: Fraction = 0.9, eps: NonNegative = 1e-6
) -> tuple[Tensor, MadgradState]:
    r"""A step towards the point that dual averaging gives: the initial parameters minus all gradients so far, scaled.

    .. math::
        \lambda_k &= (\eta + \epsilon) \sqrt{k + 1} \\
        s_{k+1} &= s_k + \lambda_k\,g_k, \qquad \nu_{k+1} = \nu_k + \lambda_k\,g_k^2 \\
        z_{k+1} &= p_0 - \frac{s_{k+1}}{\sqrt[3]{\nu_{k+1}} + \epsilon} \\
        u_k &= (1 - \mu)\,(z_{k+1} - p_k)

    for :math:`k = 0, 1, \dots` It stands at the end of a chain. As in the authors' package, :math:`\epsilon` is added to the
    learning rate too, unless that is 0.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu`, in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the cube root; the authors advise 0 where gradients are very small.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_madgrad(0.001, momentum=0.0, eps=0.0), torch.zeros(2)
    >>> opt.update(torch.tensor([1.0, -8.0]), opt.init_state(p), p)[0]  # 0.001^(2/3), times the cube root of the gradient
    tensor([-0.0100,  0.0200])

    Reference: Defazio & Jelassi, `Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged Gradient Method for
    Stochastic Optimization <https://arxiv.org/abs/2101.11075>`_, 2021.
    """
    k = s.step + 1
    weight = where(lr == 0, 0.0, lr + eps) * root(k)
    total, squares = s.s + weight * g, s.grad_sum_sq + weight * (g * g)
    z = s.x0 - total / (maximum(squares, 1e-36) ** (1 / 3) + eps)  # at 0 the slope of the cube root is infinite
    return (1 - momentum) * (z - p), MadgradState(k, squares, total, s.x0)


def madgrad(
    lr: Hyper = 1e-2, momentum: Hyper = 0.9, weight_decay: Hyper = 0.0, eps: Hyper = 1e-6, *, maximize: bool = False
) -> Transform:
    r"""MADGRAD: dual averaging, adaptive and with momentum. `weight_decay` is an :math:`L_2` penalty.

    .. math:: p_{k+1} = p_k + \mathrm{madgrad}(g_k + \lambda p_k)

    with :math:`\mathrm{madgrad}` as in `scale_by_madgrad`. The numbers are those of the authors' package (without
    ``decouple_decay``, which it calls experimental). It needs less decay than other methods, often none, and a learning rate
    of its own.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: in [0, 1).
        weight_decay: :math:`\lambda \ge 0`.
        eps: added to the cube root and to the learning rate; at least 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.madgrad(lr=0.001, momentum=0.0, eps=0.0), torch.tensor([1.0])
    >>> opt.step(torch.tensor([8.0]), opt.init_state(p), p)[0]
    tensor([0.9800])

    Reference: Defazio & Jelassi, `Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged Gradient Method for
    Stochastic Optimization <https://arxiv.org/abs/2101.11075>`_, 2021.
    """
    madgrad = scale_by_madgrad(lr, momentum=momentum, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), madgrad)
