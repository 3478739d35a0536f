"""Adadelta (Zeiler, 2012): steps in the units of the parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Hyper, NonNegative, UnitInterval
from purestep._core.maths import Scalar, counter, root
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction, scale_by_learning_rate


class AdadeltaState(NamedTuple):
    """The state of `scale_by_adadelta`."""

    step: Scalar  # updates so far
    square_avg: Tensor  # v: running mean of the squared gradient
    acc_delta: Tensor  # d: running mean of the squared update

    @classmethod
    def init(cls, p: Tensor) -> AdadeltaState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), zeros_like(p))


@leafwise(AdadeltaState)
def scale_by_adadelta(
    g: Tensor, s: AdadeltaState, p: Tensor, *, rho: UnitInterval = 0.9, eps: NonNegative = 1e-6
) -> tuple[Tensor, AdadeltaState]:
    r"""Divide by the root mean square of the gradients, and multiply by that of the updates so far.

    .. math::
        v_t &= \rho\,v_{t-1} + (1 - \rho)\,g_t^2 \\
        u_t &= \frac{\sqrt{d_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\,g_t \\
        d_t &= \rho\,d_{t-1} + (1 - \rho)\,u_t^2

    Args:
        rho: :math:`\rho`, the decay rate of both means, in [0, 1].
        eps: :math:`\epsilon \ge 0`, inside the roots: its root is the size of the first updates.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_adadelta(), torch.zeros(1)
    >>> opt.update(torch.ones(1), opt.init_state(p), p)[0]  # sqrt(1e-6 / (0.1 + 1e-6))
    tensor([0.0032])

    Reference: Zeiler, `ADADELTA: An Adaptive Learning Rate Method <https://arxiv.org/abs/1212.5701>`_, 2012.
    """
    v = rho * s.square_avg + (1 - rho) * (g * g)
    u = root(s.acc_delta + eps) / root(v + eps) * g
    return u, AdadeltaState(s.step + 1, v, rho * s.acc_delta + (1 - rho) * (u * u))


def adadelta(
    lr: Hyper = 1.0, rho: Hyper = 0.9, eps: Hyper = 1e-6, weight_decay: Hyper = 0.0, *, maximize: bool = False
) -> Transform:
    r"""Adadelta: the size of a step follows from the sizes of those before it.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{adadelta}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{adadelta}` as in `scale_by_adadelta`. The numbers are those of `torch.optim.Adadelta`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`; 1 in the paper.
        rho: the decay rate of both running means, in [0, 1].
        eps: inside the roots; at least 0.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adadelta(), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]
    tensor([0.9968])

    Reference: Zeiler, `ADADELTA: An Adaptive Learning Rate Method <https://arxiv.org/abs/1212.5701>`_, 2012.
    """
    adadelta = scale_by_adadelta(rho=rho, eps=eps)
    return chain(direction(maximize), add_decayed_weights(weight_decay), adadelta, scale_by_learning_rate(lr))


class Adadelta(Optimizer):
    """`torch.optim.Adadelta`: same signature, same numbers, same state. The mathematics is `purestep.adadelta`'s."""

    @over(adadelta)
    def __init__(
        self, params: Params, lr: Hyper = 1.0, rho: Hyper = 0.9, eps: Hyper = 1e-6, weight_decay: Hyper = 0.0,
        foreach: bool | None = None, *, capturable: bool = False, maximize: bool = False, differentiable: bool = False,
        compile: bool = False,
    ) -> None: ...  # fmt: skip
