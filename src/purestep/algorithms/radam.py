"""RAdam (Liu et al., 2020): Adam that waits until its second moment can be trusted."""

from __future__ import annotations

from torch import Tensor

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import maximum, root, where
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.algorithms.adam import AdamState, moments
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


@leafwise(AdamState)
def scale_by_radam(
    g: Tensor, s: AdamState, p: Tensor, *, betas: Betas = (0.9, 0.999), eps: NonNegative = 1e-8
) -> tuple[Tensor, AdamState]:
    r"""`scale_by_adam`, rectified: the mean alone until the variance of the second moment is small enough.

    .. math::
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        r_t &= \sqrt{\frac{(\rho_t - 4)(\rho_t - 2)\,\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\,\rho_t}} \\
        u_t &= \frac{m_t}{1 - \beta_1^t} \cdot \begin{cases}
            r_t \sqrt{1 - \beta_2^t}\,/\,(\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    with the moments :math:`m_t, v_t` of `scale_by_adam`. As in torch, :math:`\epsilon` meets the root before the bias is
    removed, and the threshold is 5.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1); for :math:`\beta_2 \le 2/3` the rectification never sets in.
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_radam(), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 1.0000e+02, -1.0000e-02])

    Reference: Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond <https://arxiv.org/abs/1908.03265>`_,
    2020.
    """
    b1, b2 = betas
    s = moments(g, s, betas)
    t = s.step
    limit = 2 / (1 - b2) - 1
    length = limit - 2 * t * b2**t / (1 - b2**t)
    most, rho = maximum(limit, 5.0), maximum(length, 5.0)  # where it is not rectified, anything finite
    rectification = root((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho) * (1 - b2**t))
    on = where(length > 5, 1.0, 0.0)
    factor = where(length > 5, rectification, 1.0) / (1 - b1**t)
    return factor * s.exp_avg / (on * root(s.exp_avg_sq) + (on * eps + 1 - on)), s


def radam(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""RAdam: Adam with a warm-up that follows from its own variance.

    .. math::
        p_t = p_{t-1} - \eta\,\mathrm{radam}(g_t + \lambda p_{t-1}) \qquad\text{or, decoupled,}\qquad
        p_t = p_{t-1} - \eta\,\bigl(\mathrm{radam}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{radam}` as in `scale_by_radam`. The numbers are those of `torch.optim.RAdam`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`.
        decoupled_weight_decay: decay past the moments, as `adamw` does.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.radam(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # plain momentum at first
    tensor([0.8000])

    Reference: Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond <https://arxiv.org/abs/1908.03265>`_,
    2020.
    """
    decay = add_decayed_weights(weight_decay)
    radam = scale_by_radam(betas=betas, eps=eps)
    parts = (radam, decay) if decoupled_weight_decay else (decay, radam)
    return chain(direction(maximize), *parts, scale_by_learning_rate(lr))


class RAdam(Optimizer):
    """`torch.optim.RAdam`: same signature, same numbers, same state. The mathematics is `purestep.radam`'s."""

    @over(radam)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, betas: Betas = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.0,
        decoupled_weight_decay: bool = False, *, foreach: bool | None = None, maximize: bool = False, capturable: bool = False,
        differentiable: bool = False, compile: bool = False,
    ) -> None: ...  # fmt: skip
