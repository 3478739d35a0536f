"""Schedule-Free learning (Defazio et al., 2024): an average of the iterates in the place of a learning rate schedule."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from purestep._core.hyper import Betas, Hyper, Interval, NonNegative, Steps
from purestep._core.maths import Scalar, counter, maximum, minimum, precise, where
from purestep.algorithms.rmsprop import scale_by_rms
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.scale import direction

Share: TypeAlias = Annotated[Any, Interval(low=0.0, high=1.0, above=True)]


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free`. The parameters are y; x is not kept, but follows from y and z."""

    step: Scalar  # t: updates so far
    z: Tensor  # the iterate that makes the steps
    weight_sum: Scalar  # the sum of the weights of all z so far
    lr_max: Scalar  # the largest learning rate so far
    momentum: Scalar  # the share of x in y

    @classmethod
    def init(cls, p: Tensor, momentum: float) -> ScheduleFreeState:
        """Before the first update."""
        return cls(counter(p), p.clone(), number(p), number(p), number(p) + momentum)

    def evaluated(self, y: Tensor) -> Tensor:
        """The average x; see `purestep.eval_params`."""
        return (y + (1 / self.momentum - 1) * (y - self.z)).to(y.dtype)


def number(p: Tensor) -> Scalar:
    """Zero, in the precision that numbers are computed in."""
    return torch.zeros((), dtype=precise(p.device), device=p.device)


@leafwise(ScheduleFreeState)
def schedule_free(
    u: Tensor,
    s: ScheduleFreeState,
    y: Tensor,
    lr: NonNegative,
    momentum: Share = 0.9,
    *,
    warmup_steps: Steps = 0,
    weight_lr_power: NonNegative = 2.0,
    r: NonNegative = 0.0,
) -> tuple[Tensor, ScheduleFreeState]:
    r"""Step along the updates, evaluate the gradient between the iterate and its average, and never decay the learning rate.

    .. math::
        z_{t+1} &= z_t - \eta_t\,u_t, \qquad \eta_t = \eta\,\min(1, t / T) \\
        x_{t+1} &= (1 - c_t)\,x_t + c_t\,z_{t+1}, \qquad c_t = \frac{w_t}{\sum_{i \le t} w_i}, \qquad
            w_t = t^r\,\bigl(\max_{i \le t} \eta_i\bigr)^\rho \\
        y_{t+1} &= (1 - \beta)\,z_{t+1} + \beta\,x_{t+1}

    The parameters are :math:`y`, where the gradients :math:`u_t` are taken (or what other transforms made of them); it stands
    at the end of a chain. What is to be evaluated, and kept in the end, is the average :math:`x`: that is
    ``eval_params(state, params)``. The state holds :math:`z`, of which :math:`x = y + (1/\beta - 1)(y - z)`.

    Statistics of batch normalization must be those of :math:`x`: before an evaluation, run it in training mode on some batches.

    Args:
        lr: :math:`\eta \ge 0`, larger than with a schedule.
        momentum: :math:`\beta`, in (0, 1].
        warmup_steps: :math:`T`, over which the learning rate rises.
        weight_lr_power: :math:`\rho \ge 0`: iterates count in the average by this power of their learning rate.
        r: :math:`r \ge 0`: late iterates count more.

    >>> import torch, purestep as ps
    >>> opt, y = ps.schedule_free(0.1), torch.tensor([0.0])
    >>> state = opt.init_state(y)
    >>> for _ in range(3):
    ...     y, state = opt.step(torch.ones(1), state, y)
    >>> state.z, ps.eval_params(state, y)  # x is the mean of -0.1, -0.2 and -0.3
    (tensor([-0.3000]), tensor([-0.2000]))

    Reference: Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024.
    """
    t = s.step + 1
    lr = lr * minimum(1.0, t / max(1, warmup_steps))
    lr_max = maximum(s.lr_max, lr)
    weight = t**r * lr_max**weight_lr_power
    weight_sum = s.weight_sum + weight
    c = weight / where(weight_sum == 0, 1.0, weight_sum)
    step = c * (s.z - y) - lr * (1 - momentum * (1 - c)) * u
    return step, ScheduleFreeState(t, s.z - lr * u, weight_sum, lr_max, momentum)


def schedule_free_sgd(
    lr: Hyper = 1.0,
    momentum: Hyper = 0.9,
    weight_decay: Hyper = 0.0,
    *,
    warmup_steps: int = 0,
    weight_lr_power: Hyper = 2.0,
    r: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    r"""Schedule-Free SGD: train :math:`y` with a constant learning rate, evaluate the average :math:`x`.

    .. math:: y_{t+1} = \mathrm{schedule\_free}(g_t + \lambda\,y_t)

    with :math:`\mathrm{schedule\_free}` as in `schedule_free`. The parameters are :math:`y`; ``eval_params(state, params)``
    is :math:`x`.

    The numbers are those of the authors' package `schedulefree` 1.4. There an optimizer has a mode, and ``eval()`` overwrites
    the parameters with :math:`x`; here the parameters are always :math:`y`. With a constant
    learning rate the numbers are optax's too; its warm-up begins with a learning rate of 0.

    Args:
        lr: :math:`\eta \ge 0`.
        momentum: :math:`\beta`, in (0, 1].
        weight_decay: :math:`\lambda \ge 0`, at :math:`y`.
        warmup_steps: over which the learning rate rises.
        weight_lr_power: iterates count in the average by this power of their learning rate; at least 0.
        r: late iterates count more; at least 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.schedule_free_sgd(lr=0.5), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(100):
    ...     p, state = opt.step(2 * p, state, p)
    >>> bool(ps.eval_params(state, p).abs() < 1e-3)
    True

    Reference: Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024.
    """
    average = schedule_free(lr, momentum, warmup_steps=warmup_steps, weight_lr_power=weight_lr_power, r=r)
    return chain(direction(maximize), add_decayed_weights(weight_decay), average)


def schedule_free_adamw(
    lr: Hyper = 2.5e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    warmup_steps: int = 0,
    weight_lr_power: Hyper = 2.0,
    r: Hyper = 0.0,
    maximize: bool = False,
) -> Transform:
    r"""Schedule-Free AdamW: gradients divided by their root mean square, and the average of the iterates as momentum.

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2)\,g_t^2 \\
        y_{t+1} &= \mathrm{schedule\_free}\Bigl(\frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda\,y_t\Bigr)

    with :math:`\mathrm{schedule\_free}` as in `schedule_free`, whose momentum is :math:`\beta_1`. The parameters are
    :math:`y`; ``eval_params(state, params)`` is :math:`x`.

    The numbers are those of the authors' package `schedulefree` 1.4. Its first versions multiplied the learning rate by
    :math:`\sqrt{1 - \beta_2^t}` instead of dividing :math:`v_t`.

    Args:
        lr: :math:`\eta \ge 0`.
        betas: :math:`\beta_1` in (0, 1), the momentum, and :math:`\beta_2` in [0, 1), the decay rate of the second moment.
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled, at :math:`y`.
        warmup_steps: over which the learning rate rises.
        weight_lr_power: iterates count in the average by this power of their learning rate; at least 0.
        r: late iterates count more; at least 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.schedule_free_adamw(lr=0.1), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> p, state = opt.step(2 * p, state, p)
    >>> p, ps.eval_params(state, p)
    (tensor([0.9000]), tensor([0.9000]))

    Reference: Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024.
    """
    rms = scale_by_rms(alpha=betas[1], eps=eps, bias_correction=True)
    average = schedule_free(lr, betas[0], warmup_steps=warmup_steps, weight_lr_power=weight_lr_power, r=r)
    return chain(direction(maximize), rms, add_decayed_weights(weight_decay), average)
