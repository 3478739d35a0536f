"""Momentum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, zeros_like

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import Scalar, counter, where
from purestep.declare import leafwise
from purestep.transform import Transform


class TraceState(NamedTuple):
    """The state of `trace`."""

    step: Scalar  # updates so far
    momentum_buffer: Tensor  # b: running sum of the gradients

    @classmethod
    def init(cls, p: Tensor) -> TraceState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p))


@leafwise(TraceState, off="momentum", sparse="dense")
def trace(
    g: Tensor, s: TraceState, p: Tensor, momentum: NonNegative, *, dampening: Hyper = 0.0, nesterov: bool = False
) -> tuple[Tensor, TraceState]:
    r"""Accumulate the gradients: heavy-ball momentum, or Nesterov's.

    .. math::
        b_t &= \mu\,b_{t-1} + (1 - \tau)\,g_t, \qquad b_1 = g_1 \\
        u_t &= \begin{cases} g_t + \mu\,b_t & \text{nesterov} \\ b_t & \text{else} \end{cases}

    As in `torch.optim.SGD` the first gradient enters undamped. With a momentum of 0 it does nothing and has no state.

    Args:
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`.
        nesterov: look ahead along the new buffer.

    >>> import torch, purestep as ps
    >>> opt, p = ps.trace(0.9), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     u, state = opt.update(torch.ones(1), state, p)
    >>> u  # 1 + 0.9 + 0.81
    tensor([2.7100])

    Reference: Sutskever et al., `On the importance of initialization and momentum in deep learning
    <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    share = where(s.step == 0, 1.0, 1 - dampening)
    b = momentum * s.momentum_buffer + share * g
    return g + momentum * b if nesterov else b, TraceState(s.step + 1, b)


def nesterov(momentum: Hyper) -> Transform:
    r"""Nesterov's momentum: `trace` that looks ahead along its buffer, :math:`u_t = g_t + \mu\,b_t`.

    Args:
        momentum: :math:`\mu \ge 0`.

    >>> import torch, purestep as ps
    >>> ps.nesterov(0.9)
    trace(0.9, dampening=0.0, nesterov=True)
    >>> opt, p = ps.nesterov(0.9), torch.zeros(1)
    >>> opt.update(torch.ones(1), opt.init_state(p), p)[0]
    tensor([1.9000])

    Reference: Sutskever et al., `On the importance of initialization and momentum in deep learning
    <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    return trace(momentum, nesterov=True)
