"""Rprop (Riedmiller & Braun, 1993): step sizes that listen only to signs."""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeAlias

from torch import Tensor, sign, zeros_like

from purestep._core.hyper import Hyper, Interval, NonNegative
from purestep._core.maths import Scalar, counter, filled, maximum, minimum, where
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.scale import direction, scale

Etas: TypeAlias = tuple[
    Annotated[float, Interval(low=0.0, high=1.0, above=True, below=True)], Annotated[float, Interval(low=1.0, above=True)]
]
StepSizes: TypeAlias = tuple[NonNegative, NonNegative]


class RpropState(NamedTuple):
    """The state of `scale_by_rprop`."""

    step: Scalar  # updates so far
    prev: Tensor  # the last gradient, 0 where its sign had changed
    step_size: Tensor  # of each coordinate

    @classmethod
    def init(cls, p: Tensor, lr: float) -> RpropState:
        """Before the first update."""
        return cls(counter(p), zeros_like(p), filled(p, lr))


@leafwise(RpropState)
def scale_by_rprop(
    g: Tensor,
    s: RpropState,
    p: Tensor,
    lr: NonNegative = 1e-2,
    *,
    etas: Etas = (0.5, 1.2),
    step_sizes: StepSizes = (1e-6, 50.0),
) -> tuple[Tensor, RpropState]:
    r"""Give every coordinate a step size of its own, which grows while its sign stays and shrinks when it turns.

    .. math::
        \Delta_t &= \mathrm{clip}\Bigl(\Delta_{t-1} \cdot
            \begin{cases} \eta^+ & g_t\,g_{t-1} > 0 \\ \eta^- & g_t\,g_{t-1} < 0 \\ 1 & \text{else} \end{cases},
            \Delta_{\min}, \Delta_{\max}\Bigr) \\
        g_t &\leftarrow 0 \quad\text{where}\quad g_t\,g_{t-1} < 0 \\
        u_t &= \mathrm{sign}(g_t)\,\Delta_t

    Where the sign has turned the coordinate stays for this update, and the next gradient meets a zero.

    Args:
        lr: :math:`\Delta_0 \ge 0`, the first step size. Later changes of it have no effect.
        etas: :math:`\eta^-, \eta^+`, the first in (0, 1), the second above 1.
        step_sizes: :math:`\Delta_{\min}, \Delta_{\max}`, at least 0.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_rprop(0.1), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> for g in ([5.0, 5.0], [0.1, -0.1]):
    ...     u, state = opt.update(torch.tensor(g), state, p)
    >>> u, state.step_size
    (tensor([0.1200, 0.0000]), tensor([0.1200, 0.0500]))

    Reference: Riedmiller & Braun, `A direct adaptive method for faster backpropagation learning: the RPROP algorithm
    <https://doi.org/10.1109/ICNN.1993.298623>`_, 1993.
    """
    (down, up), (low, high) = etas, step_sizes
    agreement = g * s.prev
    size = where(agreement > 0, up * s.step_size, where(agreement < 0, down * s.step_size, s.step_size))
    size = minimum(maximum(size, low), high)
    g = where(agreement < 0, 0.0, g)
    return sign(g) * size, RpropState(s.step + 1, g, size)


def rprop(
    lr: Hyper = 1e-2, etas: Etas = (0.5, 1.2), step_sizes: StepSizes = (1e-6, 50.0), *, maximize: bool = False
) -> Transform:
    r"""Rprop, resilient backpropagation: for gradients of the whole data set, whose sizes are ignored.

    .. math:: p_t = p_{t-1} - \mathrm{rprop}(g_t)

    with :math:`\mathrm{rprop}` as in `scale_by_rprop`. The numbers are those of `torch.optim.Rprop`.

    Args:
        lr: the first step size; at least 0. Later changes of it have no effect.
        etas: the factors by which a step size shrinks and grows, in (0, 1) and above 1.
        step_sizes: the smallest and the largest step size.
        maximize: climb instead of descending.

    >>> import torch, purestep as ps
    >>> opt, p = ps.rprop(lr=0.1), torch.tensor([1.0])
    >>> opt.step(2 * p, opt.init_state(p), p)[0]
    tensor([0.9000])

    Reference: Riedmiller & Braun, `A direct adaptive method for faster backpropagation learning: the RPROP algorithm
    <https://doi.org/10.1109/ICNN.1993.298623>`_, 1993.
    """
    return chain(direction(maximize), scale_by_rprop(lr, etas=etas, step_sizes=step_sizes), scale(-1.0))


class Rprop(Optimizer):
    """`torch.optim.Rprop`: same signature, same numbers, same state. The mathematics is `purestep.rprop`'s."""

    @over(rprop)
    def __init__(
        self, params: Params, lr: Hyper = 1e-2, etas: Etas = (0.5, 1.2), step_sizes: StepSizes = (1e-6, 50.0), *,
        capturable: bool = False, foreach: bool | None = None, maximize: bool = False, differentiable: bool = False,
        compile: bool = False,
    ) -> None: ...  # fmt: skip
