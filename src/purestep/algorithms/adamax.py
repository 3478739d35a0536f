"""Adamax (Kingma & Ba, 2015): Adam with the infinity norm."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, maximum
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdamaxState(NamedTuple):
    """The state of `scale_by_adamax`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_inf: Tensor  # v: the largest gradient, decaying

    @classmethod
    def init(cls, p: Tensor) -> AdamaxState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p))


@leafwise(AdamaxState)
def scale_by_adamax(
    g: Tensor, s: AdamaxState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: NonNegative = 1e-8
) -> tuple[Tensor, AdamaxState]:
    r"""Divide the gradient's running mean, unbiased, by the largest gradient, which decays.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t \\
        v_t &= \max(\beta_2 v_{t-1}, |g_t| + \epsilon) \\
        u_t &= \frac{m_t}{(1 - \beta_1^t)\,v_t}

    As in torch and in optax, :math:`\epsilon` is added to the gradient.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`; at 0 a gradient that is always 0 gives 0/0.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adamax(), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 1.0000, -1.0000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015,
    algorithm 2.
    """
    b1, b2 = betas
    t = s.step + 1
    m = lerp(s.exp_avg, g, 1 - b1)
    v = maximum(b2 * s.exp_inf, abs(g) + eps)
    return 1 / (1 - b1**t) * m / v, AdamaxState(t, m, v)


def adamax(
    lr: Hyper = 2e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Adamax: Adam with the infinity norm in the place of the root mean square.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{adamax}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{adamax}` as in `scale_by_adamax`. The numbers are those of `torch.optim.Adamax`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the mean and of the largest gradient, each in [0, 1).
        eps: added to the size of the gradient; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adamax(lr=0.1), torch.tensor([1.0])
    >>> p, state = opt.step(2 * p, opt.init_state(p), p)
    >>> p
    tensor([0.9000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015.
    """
    adamax = scale_by_adamax(betas=betas, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), adamax, scale_by_learning_rate(lr))


class Adamax(Optimizer):
    """`torch.optim.Adamax`: same signature, same numbers, same state. The mathematics is `purestep.adamax`'s."""

    @over(adamax)
    def __init__(
        self, params: Params, lr: Hyper = 2e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0,
        foreach: bool | None = None, *, maximize: bool = False, differentiable: bool = False, capturable: bool = False,
        compile: bool = False,
    ) -> None: ...  # fmt: skip
