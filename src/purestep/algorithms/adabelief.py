"""AdaBelief (Zhuang et al., 2020): Adam with the variance of the gradient in the place of its second moment."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp
from purestep.algorithms.adam import ratio
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdaBeliefState(NamedTuple):
    """The state of `scale_by_adabelief`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_var: Tensor  # s: running mean of the gradient's squared distance from m

    @classmethod
    def init(cls, p: Tensor) -> AdaBeliefState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p))


@leafwise(AdaBeliefState)
def scale_by_adabelief(
    g: Tensor, s: AdaBeliefState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: NonNegative = 1e-16
) -> tuple[Tensor, AdaBeliefState]:
    r"""Divide the gradient's running mean by its running standard deviation, both unbiased.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t \\
        s_t &= \beta_2 s_{t-1} + (1 - \beta_2)\,(g_t - m_t)^2 + \epsilon \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    As in the paper, in the authors' package and in optax, the :math:`\epsilon` that is added to :math:`s` stays in it. optax
    takes two numbers, ``eps`` and ``eps_root``; here they are one, as in the paper.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, within the root and outside of it, so it is far smaller than Adam's. Of a gradient that
            never changes it is what limits the step.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adabelief(betas=(0.5, 0.999)), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> for g in ([3.0, 3.0], [3.0, -3.0]):
    ...     u, state = opt.update(torch.tensor(g), state, p)
    >>> u  # larger where the gradient was as foreseen
    tensor([ 2.5302, -0.5229])

    Reference: Zhuang et al., `AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients
    <https://arxiv.org/abs/2010.07468>`_, 2020.
    """
    b1, b2 = betas
    m = lerp(s.exp_avg, g, 1 - b1)
    surprise = g - m
    s = AdaBeliefState(s.step + 1, m, b2 * s.exp_avg_var + (1 - b2) * (surprise * surprise) + eps)
    return ratio(s.step, s.exp_avg, s.exp_avg_var, betas, eps), s


def adabelief(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-16,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""AdaBelief: long steps where the gradient is what its mean foretold; with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{adabelief}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{adabelief}` as in `scale_by_adabelief`. The numbers are those of the authors' package
    (``AdaBelief(rectify=False)``), which by default rectifies the first steps as `radam` does; the paper does not.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the mean and of the variance, each in [0, 1).
        eps: added to the variance and to its root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adabelief(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # the mean is 2, its distance from the gradient 0.9 * 2
    tensor([0.8889])

    Reference: Zhuang et al., `AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients
    <https://arxiv.org/abs/2010.07468>`_, 2020.
    """
    adabelief = scale_by_adabelief(betas=betas, eps=eps)
    return chain(direction(maximize), adabelief, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
