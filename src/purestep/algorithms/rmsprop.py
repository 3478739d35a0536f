"""RMSprop (Tieleman & Hinton, 2012), and the centered variant (Graves, 2013)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import Scalar, counter, lerp, maximum, root
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.momentum import trace
from purestep.transforms.scale import direction, scale_by_learning_rate


class RmsState(NamedTuple):
    """The state of `scale_by_rms`."""

    step: Scalar  # updates so far
    square_avg: Tensor  # v: running mean of the squared gradient

    @classmethod
    def init(cls, p: Tensor) -> RmsState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


class StddevState(NamedTuple):
    """The state of `scale_by_stddev`."""

    step: Scalar  # updates so far
    square_avg: Tensor  # v: running mean of the squared gradient
    grad_avg: Tensor  # m: running mean of the gradient

    @classmethod
    def init(cls, p: Tensor) -> StddevState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p))


@leafwise(RmsState)
def scale_by_rms(
    g: Tensor,
    s: RmsState,
    p: Tensor,
    *,
    alpha: NonNegative = 0.99,
    eps: NonNegative = 1e-8,
    bias_correction: bool = False,
) -> tuple[Tensor, RmsState]:
    r"""Divide by the running root mean square of the gradients.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha)\,g_t^2 \\
        u_t &= \frac{g_t}{\sqrt{\hat v_t} + \epsilon}, \qquad
            \hat v_t = \begin{cases} v_t / (1 - \alpha^t) & \text{bias correction} \\ v_t & \text{else} \end{cases}

    Args:
        alpha: :math:`\alpha \ge 0`, the decay rate.
        eps: :math:`\epsilon \ge 0`, outside the root, as in torch (optax has it inside by default).
        bias_correction: divide :math:`v_t`, which begins at 0, by the sum of its weights so far, as Adam does.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_rms(alpha=0.75), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 2.0000, -2.0000])

    Reference: Tieleman & Hinton, `Lecture 6.5, RMSprop
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012.
    """
    t = s.step + 1
    v = alpha * s.square_avg + (1 - alpha) * (g * g)
    return g / (root(v / (1 - alpha**t) if bias_correction else v) + eps), RmsState(t, v)


@leafwise(StddevState)
def scale_by_stddev(
    g: Tensor, s: StddevState, p: Tensor, *, alpha: NonNegative = 0.99, eps: NonNegative = 1e-8
) -> tuple[Tensor, StddevState]:
    r"""Divide by the running standard deviation of the gradients.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha)\,g_t^2, \qquad m_t = \alpha m_{t-1} + (1 - \alpha)\,g_t \\
        u_t &= \frac{g_t}{\sqrt{\max(v_t - m_t^2, 0)} + \epsilon}

    The maximum guards against rounding: where torch's variance comes out just below 0, its step is NaN.

    Args:
        alpha: :math:`\alpha \ge 0`, the decay rate of both means.
        eps: :math:`\epsilon \ge 0`, outside the root.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_stddev(alpha=0.5), torch.zeros(1)
    >>> opt.update(torch.tensor([3.0]), opt.init_state(p), p)[0]  # 3 / sqrt(9/2 - 9/4)
    tensor([2.])

    Reference: Graves, `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_, 2013.
    """
    v = alpha * s.square_avg + (1 - alpha) * (g * g)
    m = lerp(s.grad_avg, g, 1 - alpha)
    return g / (root(maximum(v - m * m, 0.0)) + eps), StddevState(s.step + 1, v, m)


def rmsprop(
    lr: Hyper = 1e-2,
    alpha: Hyper = 0.99,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    momentum: Hyper = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""RMSprop: every coordinate's step is divided by its running root mean square, then accumulated by the momentum.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{trace}\bigl(\mathrm{rms}(g_t + \lambda p_{t-1})\bigr)

    with :math:`\mathrm{rms}` as in `scale_by_rms` (`scale_by_stddev` if `centered`) and :math:`\mathrm{trace}` as in
    `trace`. The numbers are those of `torch.optim.RMSprop`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        alpha: the decay rate of the running means; at least 0.
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        momentum: at least 0; at 0 there is no momentum buffer.
        centered: divide by the standard deviation.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.rmsprop(lr=0.01), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]  # 1 - 0.01 / sqrt(0.01)
    tensor([0.9000])

    Reference: Tieleman & Hinton, `Lecture 6.5, RMSprop
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012.
    """
    rms = (scale_by_stddev if centered else scale_by_rms)(alpha=alpha, eps=eps)
    decay = add_decayed_weights(weight_decay)
    return chain(direction(maximize), decay, rms, trace(momentum), scale_by_learning_rate(lr))


class RMSprop(Optimizer):
    """`torch.optim.RMSprop`: same signature, same numbers, same state. The mathematics is `purestep.rmsprop`'s."""

    _before: ClassVar = {"momentum": 0.0}

    @over(rmsprop)
    def __init__(
        self, params: Params, lr: Hyper = 1e-2, alpha: Hyper = 0.99, eps: Hyper = 1e-8, weight_decay: Hyper = 0.0,
        momentum: Hyper = 0.0, centered: bool = False, capturable: bool = False, foreach: bool | None = None,
        maximize: bool = False, differentiable: bool = False, *, compile: bool = False,
    ) -> None: ...  # fmt: skip
