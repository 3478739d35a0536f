"""Yogi (Zaheer et al., 2018): Adam whose second moment grows and shrinks by the gradient's square alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, sign, zeros_like

from purestep._core.hyper import Betas, Hyper, NonNegative
from purestep._core.maths import Scalar, counter, filled, lerp
from purestep.algorithms.adam import ratio
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class YogiState(NamedTuple):
    """The state of `scale_by_yogi`."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the gradient
    exp_avg_sq: Tensor  # v: follows the gradient's square

    @classmethod
    def init(cls, p: Tensor, initial_accumulator_value: float) -> YogiState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), filled(p, initial_accumulator_value))


@leafwise(YogiState)
def scale_by_yogi(
    g: Tensor,
    s: YogiState,
    p: Tensor,
    *,
    betas: Betas = (0.9, 0.999),
    eps: NonNegative = 1e-3,
    initial_accumulator_value: NonNegative = 1e-6,
) -> tuple[Tensor, YogiState]:
    r"""`scale_by_adam` with a second moment that forgets no faster than gradients come in.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1)\,g_t \\
        v_t &= v_{t-1} - (1 - \beta_2)\,\mathrm{sign}(v_{t-1} - g_t^2)\,g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    Adam's :math:`v` moves by a share of :math:`v_{t-1} - g_t^2`; so after large gradients it falls fast, and the steps grow.

    The bias is removed, as in optax; the paper's algorithm leaves that out. The mean starts at 0, as in the paper; in optax
    it starts at `initial_accumulator_value` too.

    Args:
        betas: :math:`\beta_1, \beta_2`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`, outside the root.
        initial_accumulator_value: :math:`v_0 \ge 0`. Later changes of it have no effect.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_yogi(betas=(0.9, 0.9)), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for g in (10.0, 1.0):
    ...     u, state = opt.update(torch.tensor([g]), state, p)
    >>> state.exp_avg_sq  # 10 - 0.1; Adam's is 9 + 0.1
    tensor([9.9000])

    Reference: Zaheer et al., `Adaptive Methods for Nonconvex Optimization
    <https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization>`_, 2018.
    """
    b1, b2 = betas
    square = g * g
    v = s.exp_avg_sq - (1 - b2) * (sign(s.exp_avg_sq - square) * square)
    s = YogiState(s.step + 1, lerp(s.exp_avg, g, 1 - b1), v)
    return ratio(s.step, s.exp_avg, s.exp_avg_sq, betas, eps), s


def yogi(
    lr: Hyper = 1e-2,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-3,
    weight_decay: Hyper = 0.0,
    initial_accumulator_value: Hyper = 1e-6,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Yogi: Adam whose effective learning rate rises slowly. `weight_decay` is an :math:`L_2` penalty.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{yogi}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{yogi}` as in `scale_by_yogi`, where it is said how published versions differ.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0. The paper finds 1e-3 better than Adam's 1e-8.
        weight_decay: :math:`\lambda \ge 0`.
        initial_accumulator_value: where the second moment starts; at least 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.yogi(lr=0.1, initial_accumulator_value=0.0), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # at first it is Adam
    tensor([0.9000])

    Reference: Zaheer et al., `Adaptive Methods for Nonconvex Optimization
    <https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization>`_, 2018.
    """
    yogi = scale_by_yogi(betas=betas, eps=eps, initial_accumulator_value=initial_accumulator_value)
    return chain(direction(maximize), add_decayed_weights(weight_decay), yogi, scale_by_learning_rate(lr))
