"""Lion (Chen et al., 2023): the sign of a momentum, found by a search over programs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, sign, zeros_like

from purestep._core.hyper import Betas, Hyper
from purestep._core.maths import Scalar, counter, lerp
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class LionState(NamedTuple):
    """The state of `scale_by_lion`."""

    step: Scalar  # updates so far
    exp_avg: Tensor  # m: running mean of the gradient

    @classmethod
    def init(cls, p: Tensor) -> LionState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


@leafwise(LionState)
def scale_by_lion(g: Tensor, s: LionState, p: Tensor, *, betas: Betas = (0.9, 0.99)) -> tuple[Tensor, LionState]:
    r"""Take the sign of the gradient mixed with its running mean, which forgets at a rate of its own.

    .. math::
        u_t &= \mathrm{sign}\bigl(\beta_1 m_{t-1} + (1 - \beta_1)\,g_t\bigr) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2)\,g_t

    Args:
        betas: :math:`\beta_1`, the share of the mean in the step, and :math:`\beta_2`, the mean's decay rate, each in [0, 1).

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_lion(), torch.zeros(2)
    >>> opt.update(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 1., -1.])

    Reference: Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023.
    """
    b1, b2 = betas
    return sign(lerp(s.exp_avg, g, 1 - b1)), LionState(s.step + 1, lerp(s.exp_avg, g, 1 - b2))


def lion(lr: Hyper = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: Hyper = 0.0, *, maximize: bool = False) -> Transform:
    r"""Lion: every coordinate moves by the learning rate, in the direction of a sign; with decoupled weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\bigl(\mathrm{lion}(g_t) + \lambda p_{t-1}\bigr)

    with :math:`\mathrm{lion}` as in `scale_by_lion`. Its state is half of Adam's. Its steps are larger than Adam's, so the
    learning rate is three to ten times smaller, and the weight decay as much larger. The numbers are the authors'.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        betas: the share of the running mean in the step, and the mean's decay rate, each in [0, 1).
        weight_decay: :math:`\lambda \ge 0`, decoupled.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.lion(lr=0.1), torch.tensor([1.0, -1.0])
    >>> opt.step(torch.tensor([100.0, -0.01]), opt.init_state(p), p)[0]
    tensor([ 0.9000, -0.9000])

    Reference: Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023.
    """
    return chain(direction(maximize), scale_by_lion(betas=betas), add_decayed_weights(weight_decay), scale_by_learning_rate(lr))
