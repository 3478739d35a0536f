"""Averages of the parameters, to evaluate a model with; the parameters themselves go on as they would."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from purestep._core.hyper import Period, Steps, UnitInterval
from purestep._core.maths import Scalar, counter, lerp, maximum, where
from purestep.declare import leafwise


class EmaParamsState(NamedTuple):
    """The state of `ema_params`."""

    step: Scalar  # t: updates so far
    ema: Tensor  # a: the average of the parameters

    @classmethod
    def init(cls, p: Tensor) -> EmaParamsState:
        """Before the first update."""
        return cls(counter(p), p.clone())

    def evaluated(self, p: Tensor) -> Tensor:
        """The average of the parameters; see `purestep.eval_params`."""
        return self.ema


@leafwise(EmaParamsState)
def ema_params(u: Tensor, s: EmaParamsState, p: Tensor, decay: UnitInterval = 0.999) -> tuple[Tensor, EmaParamsState]:
    r"""Keep an exponential moving average of the parameters. The updates pass through.

    .. math:: a_t = \beta_t\,a_{t-1} + (1 - \beta_t)\,(p_{t-1} + u_t), \qquad a_1 = p_0 + u_1

    It stands at the end of a chain, where :math:`p_{t-1} + u_t` are the new parameters. The average is read with
    `purestep.eval_params` (with the stateful optimizer with its method `eval_params`, or as ``optimizer.state[p]["ema"]``):
    no mode is switched, and no parameter is swapped. A decay that begins small is a schedule,
    ``lambda step: ps.minimum(0.999, (1 + step) / (10 + step))``.

    The numbers are those of `torch.optim.swa_utils.AveragedModel` with ``get_ema_multi_avg_fn(decay)``, updated after every
    step: the average begins with the parameters after the first update.

    Args:
        decay: :math:`\beta`, in [0, 1].

    >>> import torch, purestep as ps
    >>> opt, p = ps.chain(ps.sgd(lr=1.0), ps.ema_params(0.9)), torch.tensor([0.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(2):
    ...     p, state = opt.step(torch.tensor([-1.0]), state, p)
    >>> p, ps.eval_params(state, p)
    (tensor([2.]), tensor([1.1000]))

    References: Tarvainen & Valpola, `Mean teachers are better role models <https://arxiv.org/abs/1703.01780>`_, 2017;
    Morales-Brotons et al., `Exponential Moving Average of Weights in Deep Learning <https://arxiv.org/abs/2411.18704>`_,
    2024.
    """
    return u, EmaParamsState(s.step + 1, lerp(s.ema, p + u, where(s.step == 0, 1.0, 1 - decay)))


class AverageParamsState(NamedTuple):
    """The state of `average_params`."""

    step: Scalar  # t: updates so far
    n_averaged: Scalar  # n: how many of the parameters are in the average
    average: Tensor  # a: the average of the parameters

    @classmethod
    def init(cls, p: Tensor) -> AverageParamsState:
        """Before the first update."""
        return cls(counter(p), counter(p), p.clone())

    def evaluated(self, p: Tensor) -> Tensor:
        """The average of the parameters; see `purestep.eval_params`."""
        return self.average


@leafwise(AverageParamsState)
def average_params(
    u: Tensor, s: AverageParamsState, p: Tensor, *, start: Steps = 0, every: Period = 1
) -> tuple[Tensor, AverageParamsState]:
    r"""Keep the mean of the parameters, from some update on: stochastic weight averaging. The updates pass through.

    .. math:: a \leftarrow a + \frac{1}{n}\,(p_{t-1} + u_t - a), \qquad n = 1, 2, \dots

    at the updates :math:`t = t_0 + c, t_0 + 2c, \dots`; before the first of them :math:`a` is the parameters. It stands at the
    end of a chain, where :math:`p_{t-1} + u_t` are the new parameters. The average is read with `purestep.eval_params` (with
    the stateful optimizer with its method `eval_params`, or as ``optimizer.state[p]["average"]``): no mode is switched, and
    no parameter is swapped. Batch normalization needs new statistics for it, as `torch.optim.swa_utils.update_bn` makes them.

    The numbers are those of `torch.optim.swa_utils.AveragedModel`, updated at these steps.

    Args:
        start: :math:`t_0`, how many updates to wait.
        every: :math:`c`, after how many updates the parameters join the average; at least 1. With the number of updates in
            an epoch they do so at the end of each.

    >>> import torch, purestep as ps
    >>> opt, p = ps.chain(ps.sgd(lr=1.0), ps.average_params(start=1)), torch.tensor([0.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.tensor([-1.0]), state, p)
    ...     print(p, ps.eval_params(state, p))
    tensor([1.]) tensor([1.])
    tensor([2.]) tensor([2.])
    tensor([3.]) tensor([2.5000])

    Reference: Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization
    <https://arxiv.org/abs/1803.05407>`_, 2018.
    """
    t = s.step + 1
    late = where(t > start, (t - start) % every, 1.0)  # 0 where the parameters join the average
    n = where(late == 0, s.n_averaged + 1, s.n_averaged)
    share = where(n == 0, 1.0, where(late == 0, 1 / maximum(n, 1.0), 0.0))
    return u, AverageParamsState(t, n, lerp(s.average, p + u, share))
