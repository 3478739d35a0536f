"""Fromage (Bernstein et al., 2020): steps relative to the size of a layer, which does not grow by them."""

from __future__ import annotations

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative
from purestep._core.maths import root
from purestep.compose import chain
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.norms import scale_by_trust_ratio
from purestep.transforms.scale import direction


@leafwise()
def scale_by_fromage(u: Tensor, p: Tensor, lr: NonNegative) -> Tensor:
    r"""A step of the learning rate, after which the parameter shrinks by what a step at a right angle has made it longer.

    .. math:: u \leftarrow \frac{p - \eta\,u}{\sqrt{1 + \eta^2}} - p

    It stands at the end of a chain, after `scale_by_trust_ratio`, which makes updates as long as their parameters.

    Args:
        lr: the learning rate :math:`\eta \ge 0`.

    >>> import torch, purestep as ps
    >>> opt, p = ps.scale_by_fromage(0.75), torch.tensor([5.0, 0.0])
    >>> p, _ = opt.step(torch.tensor([0.0, 5.0]), opt.init_state(p), p)
    >>> p, p.norm()
    (tensor([ 4., -3.]), tensor(5.))

    Reference: Bernstein et al., `On the distance between two neural networks and the stability of learning
    <https://arxiv.org/abs/2002.03432>`_, 2020.
    """
    shrink = 1 / root(1 + lr**2)
    return -(lr * shrink) * u + (shrink - 1) * p


def fromage(lr: Hyper = 1e-2, min_norm: Hyper = 0.0, *, maximize: bool = False) -> Transform:
    r"""Fromage: every parameter moves by a share of its own norm, and does not grow by it. Nothing but `lr` to tune.

    .. math::
        p_t = \frac{1}{\sqrt{1 + \eta^2}} \Bigl(p_{t-1} - \eta\,\frac{\lVert p_{t-1} \rVert_2}{\lVert g_t \rVert_2}\,g_t\Bigr)

    Where a parameter or its gradient is exactly 0 the ratio is 1, as in the authors' code: a parameter that begins at 0
    leaves it with a step of :math:`\eta g`. optax bounds both norms from below with ``min_norm=1e-6`` instead, so there that
    step is :math:`10^{-6}\,\eta` long; give the same `min_norm` for its numbers.

    Args:
        lr: the learning rate :math:`\eta \ge 0`, the length of a step relative to the parameter; 0.01 is the paper's.
        min_norm: the least norm that a parameter or a gradient is taken to have; at least 0.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.fromage(lr=0.75), torch.tensor([5.0, 0.0])
    >>> opt.step(torch.tensor([0.0, 1000.0]), opt.init_state(p), p)[0]
    tensor([ 4., -3.])

    Reference: Bernstein et al., `On the distance between two neural networks and the stability of learning
    <https://arxiv.org/abs/2002.03432>`_, 2020.
    """
    return chain(direction(maximize), scale_by_trust_ratio(min_norm=min_norm), scale_by_fromage(lr))
