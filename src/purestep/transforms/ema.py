"""A running mean of the updates."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Fraction
from purestep._core.maths import Scalar, counter, lerp
from purestep.declare import leafwise


class EmaState(NamedTuple):
    """The state of `ema`, the running mean."""

    step: Scalar  # t: updates so far
    exp_avg: Tensor  # m: running mean of the updates

    @classmethod
    def init(cls, p: Tensor) -> EmaState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


@leafwise(EmaState)
def ema(u: Tensor, s: EmaState, p: Tensor, decay: Fraction, *, debias: bool = True) -> tuple[Tensor, EmaState]:
    r"""Replace the updates by their running mean.

    .. math::
        m_t &= \beta\,m_{t-1} + (1 - \beta)\,u_t \\
        u_t &\leftarrow \begin{cases} m_t / (1 - \beta^t) & \text{debias} \\ m_t & \text{else} \end{cases}

    The mean begins at 0, and without `debias` the first updates are too short. `trace` is the running sum,
    :math:`1 / (1 - \beta)` times as long. To average parameters, not updates, is another thing: see `eval_params`.

    Args:
        decay: :math:`\beta`, in [0, 1).
        debias: divide by the sum of the weights so far.

    >>> import torch, purestep as ps
    >>> p, u = torch.zeros(1), torch.ones(1)
    >>> for opt in (ps.ema(0.9), ps.ema(0.9, debias=False)):
    ...     print(opt.update(u, opt.init_state(p), p)[0])
    tensor([1.])
    tensor([0.1000])

    Reference: Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2015,
    section 3.
    """
    t = s.step + 1
    m = lerp(s.exp_avg, u, 1 - decay)
    return m / (1 - decay**t) if debias else m, EmaState(t, m)
