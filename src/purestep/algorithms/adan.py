"""Adan (Xie et al., 2022): Adam with Nesterov's look ahead along the change of the gradient."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor, zeros_like

from purestep._core.hyper import Fraction, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, root, where
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate

ThreeBetas: TypeAlias = tuple[Fraction, Fraction, Fraction]


class AdanState(NamedTuple):
    """The state of `scale_by_adan`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_diff: Tensor  # d: running mean of its change
    exp_avg_sq: Tensor  # n: running mean of the square of the gradient that is looked ahead to
    pre_grad: Tensor  # the last gradient

    @classmethod
    def init(cls, p: Tensor) -> AdanState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p), zeros_like(p), zeros_like(p))


@leafwise(AdanState)
def scale_by_adan(
    g: Tensor, s: AdanState, p: Tensor, *, betas: ThreeBetas = (0.98, 0.92, 0.99), eps: NonNegative = 1e-8
) -> tuple[Tensor, AdanState]:
    r"""Add the running means of the gradient and of its change, over a running root mean square; all three unbiased.

    .. math::
        \Delta_t &= g_t - g_{t-1}, \qquad \Delta_1 = 0 \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t, \qquad d_t = \beta_2 d_{t-1} + (1 - \beta_2)\,\Delta_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3)\,(g_t + \beta_2 \Delta_t)^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t) + \beta_2\,d_t / (1 - \beta_2^t)}{\sqrt{n_t / (1 - \beta_3^t)} + \epsilon}

    The betas are decay rates, as in the authors' code; the paper's are one minus these. optax 0.2.8 takes decay rates too, but
    has :math:`1 - \beta_2` where :math:`\beta_2` stands before :math:`\Delta_t` and :math:`d_t`.

    Args:
        betas: :math:`\beta_1, \beta_2, \beta_3`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adan(betas=(0.0, 0.5, 0.9)), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> for g in ([1.0, 1.0], [1.0, 2.0]):
    ...     u, state = opt.update(torch.tensor(g), state, p)
    >>> u  # 2 + 0.5 * 0.5 / 0.75, over the root of the weighted mean of 1 and (2 + 0.5 * 1)^2
    tensor([1.0000, 1.2028])

    Reference: Xie et al., `Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models
    <https://arxiv.org/abs/2208.06677>`_, 2022.
    """
    b1, b2, b3 = betas
    t = s.step + 1
    change = where(s.step == 0, 0.0, g - s.pre_grad)
    ahead = g + b2 * change
    m = lerp(s.exp_avg, g, 1 - b1)
    d = lerp(s.exp_avg_diff, change, 1 - b2)
    n = b3 * s.exp_avg_sq + (1 - b3) * (ahead * ahead)
    u = (m / (1 - b1**t) + b2 / (1 - b2**t) * d) / (root(n / (1 - b3**t)) + eps)
    return u, AdanState(t, m, d, n, g)


def adan(
    lr: Hyper = 1e-3,
    betas: ThreeBetas = (0.98, 0.92, 0.99),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Adan: Adam that looks ahead along the change of the gradient; with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{adan}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{adan}` as in `scale_by_adan`. The numbers are those of the authors' code with ``no_prox=True``, the
    decay of `adamw`. Its default, and the paper's, is to divide by :math:`1 + \eta\lambda` after the step, which differs by
    :math:`O(\eta^2 \lambda)`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`; five to ten times that of Adam.
        betas: decay rates of the gradient, of its change, and of the second moment, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adan(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # without a change to look along, it is Adam
    tensor([0.9000])

    Reference: Xie et al., `Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models
    <https://arxiv.org/abs/2208.06677>`_, 2022.
    """
    adan = scale_by_adan(betas=betas, eps=eps)
    return chain(direction(maximize), adan, add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
