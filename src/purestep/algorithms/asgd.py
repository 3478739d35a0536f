"""Averaged stochastic gradient descent (Polyak & Juditsky, 1992)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import Scalar, counter, filled, lerp, maximum
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction


class AsgdState(NamedTuple):
    """The state of `scale_by_asgd`."""

    step: Scalar  # t: updates so far
    eta: Scalar  # the next learning rate
    mu: Scalar  # the next parameters' share in the average
    ax: Tensor  # the average of the parameters

    @classmethod
    def init(cls, p: Tensor, lr: float) -> AsgdState:
        """Before the first update."""
        return cls(counter(p), filled(counter(p), lr), counter(p) + 1, p.clone())

    def evaluated(self, p: Tensor) -> Tensor:
        """The average of the parameters; see `purestep.eval_params`."""
        return self.ax


@leafwise(AsgdState)
def scale_by_asgd(
    g: Tensor,
    s: AsgdState,
    p: Tensor,
    lr: NonNegative = 1e-2,
    *,
    lambd: Hyper = 1e-4,
    alpha: Hyper = 0.75,
    t0: Hyper = 1e6,
) -> tuple[Tensor, AsgdState]:
    r"""A step down the gradient with a decaying learning rate, and the average of the parameters it leads to.

    .. math::
        u_t &= -\eta_t\,(g_t + \lambda\,p_{t-1}) \\
        a_t &= a_{t-1} + \mu_t\,(p_{t-1} + u_t - a_{t-1}) \\
        \eta_{t+1} &= \frac{\eta_0}{(1 + \lambda\,\eta_0\,t)^\alpha}, \qquad \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    with :math:`\eta_1 = \eta_0` and :math:`\mu_1 = 1`: until :math:`t_0` the average is the parameters themselves. It stands
    at the end of a chain. The average is read with `purestep.eval_params`.

    Args:
        lr: :math:`\eta_0 \ge 0`.
        lambd: :math:`\lambda`, the decay.
        alpha: :math:`\alpha`, the power of the learning rate's decay.
        t0: :math:`t_0`, the update after which the average begins.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_asgd(0.1, t0=0), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.ones(1), state, p)
    >>> p, ps.eval_params(state, p)  # the mean of 0.8 and 0.7, but for the decay
    (tensor([0.7000]), tensor([0.7500]))

    Reference: Polyak & Juditsky, `Acceleration of Stochastic Approximation by Averaging
    <https://doi.org/10.1137/0330046>`_, 1992; Bottou's `choice of the learning rate
    <https://leon.bottou.org/projects/sgd>`_.
    """
    t = s.step + 1
    u = -s.eta * (g + lambd * p)
    ax = lerp(s.ax, p + u, s.mu)
    return u, AsgdState(t, lr / (1 + lambd * lr * t) ** alpha, 1 / maximum(1.0, t - t0), ax)


def asgd(
    lr: Hyper = 1e-2,
    lambd: Hyper = 1e-4,
    alpha: Hyper = 0.75,
    t0: Hyper = 1e6,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Averaged stochastic gradient descent: train one set of parameters, evaluate the average of them all.

    .. math:: p_t = p_{t-1} + \mathrm{asgd}(g_t + \lambda_2\,p_{t-1})

    with :math:`\mathrm{asgd}` as in `scale_by_asgd`. The numbers are those of `torch.optim.ASGD`. The average is read with
    ``eval_params(state, params)`` (with the stateful optimizer with its method `eval_params`, or as
    ``optimizer.state[p]["ax"]``).

    Args:
        lr: the learning rate :math:`\eta_0 \ge 0`.
        lambd: decay; also how fast the learning rate falls.
        alpha: the power of the learning rate's decay.
        t0: the update after which the average begins.
        weight_decay: :math:`\lambda_2 \ge 0`, an :math:`L_2` penalty.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.asgd(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]
    tensor([0.8000])

    Reference: Polyak & Juditsky, `Acceleration of Stochastic Approximation by Averaging
    <https://doi.org/10.1137/0330046>`_, 1992.
    """
    asgd = scale_by_asgd(lr, lambd=lambd, alpha=alpha, t0=t0)
    return chain(direction(maximize), add_decayed_weights(weight_decay), asgd)


class ASGD(Optimizer):
    """`torch.optim.ASGD`: same signature, same numbers, same state. The mathematics is `purestep.asgd`'s."""

    @over(asgd)
    def __init__(
        self, params: Params, lr: Hyper = 1e-2, lambd: Hyper = 1e-4, alpha: Hyper = 0.75, t0: Hyper = 1e6,
        weight_decay: Hyper = 0.0, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False,
        capturable: bool = False, *, compile: bool = False,
    ) -> None: ...  # fmt: skip
