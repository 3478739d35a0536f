"""Stochastic gradient descent, with momentum (Polyak, 1964; Sutskever et al., 2013)."""

from __future__ import annotations

from purestep._core.hyper import Hyper
from purestep._optimizer.mirror import over
from purestep._optimizer.optimizer import Optimizer, Params
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.momentum import trace
from purestep.transforms.scale import direction, scale_by_learning_rate


def sgd(
    lr: Hyper = 1e-3,
    momentum: Hyper = 0.0,
    dampening: Hyper = 0.0,
    weight_decay: Hyper = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""Stochastic gradient descent, with momentum, Nesterov's momentum and weight decay.

    .. math:: p_t = p_{t-1} - \eta\,\mathrm{trace}(g_t + \lambda p_{t-1})

    with :math:`\mathrm{trace}` as in `trace`: the learning rate stands outside the momentum buffer. The numbers are those
    of `torch.optim.SGD`.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.
        momentum: :math:`\mu \ge 0`; at 0 there is no momentum buffer.
        dampening: of the gradients that enter the buffer, all but the first.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        nesterov: look ahead along the buffer; needs a momentum, and no dampening.
        maximize: climb instead of descending.

    Raises:
        ValueError: `nesterov` without momentum or with dampening, or a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.sgd(lr=0.1, momentum=0.9), torch.tensor([1.0])
    >>> state = opt.init_state(p)
    >>> for _ in range(2):
    ...     p, state = opt.step(torch.tensor([1.0]), state, p)
    >>> p  # 1 - 0.1 - 0.19
    tensor([0.7100])

    Reference: Sutskever et al., `On the importance of initialization and momentum in deep learning
    <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
    """
    if nesterov and (
        (isinstance(momentum, (int, float)) and momentum <= 0) or (isinstance(dampening, (int, float)) and dampening)
    ):
        raise ValueError(
            f"Nesterov momentum requires a momentum and zero dampening, but got momentum={momentum!r} and "
            f"dampening={dampening!r}."
        )
    momentum_ = trace(momentum, dampening=dampening, nesterov=nesterov)
    return chain(direction(maximize), add_decayed_weights(weight_decay), momentum_, scale_by_learning_rate(lr))


class SGD(Optimizer):
    """`torch.optim.SGD`: same signature, same numbers, same state. The mathematics is `purestep.sgd`'s."""

    _uncounted = frozenset({"momentum_buffer"})

    @over(sgd)
    def __init__(
        self, params: Params, lr: Hyper = 1e-3, momentum: Hyper = 0.0, dampening: Hyper = 0.0, weight_decay: Hyper = 0.0,
        nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None, differentiable: bool = False,
        fused: bool | None = None, compile: bool = False,
    ) -> None: ...  # fmt: skip
