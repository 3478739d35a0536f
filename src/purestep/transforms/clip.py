"""Clip the updates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purestep._core.hyper import NonNegative
from purestep._core.maths import global_norm, maximum, minimum
from purestep._core.primitives import EmptyState
from purestep.declare import leafwise, whole


@leafwise(sparse="rows")
def clip(u: Tensor, p: Tensor, max_value: NonNegative) -> Tensor:
    r"""Clip every element: :math:`u \leftarrow \max(-c, \min(u, c))`.

    Equal to `torch.nn.utils.clip_grad_value_`, without changing the gradient.

    Args:
        max_value: :math:`c \ge 0`.

    >>> import torch, purestep as ps
    >>> opt, p = ps.clip(1.0), torch.zeros(3)
    >>> opt.update(torch.tensor([-3.0, 0.5, 2.0]), opt.init_state(p), p)[0]
    tensor([-1.0000,  0.5000,  1.0000])
    """
    return minimum(maximum(u, -max_value), max_value)


@whole(scales=True, sparse="rows")
def clip_by_global_norm(us: list[Tensor], s: EmptyState, ps: list[Tensor], max_norm: NonNegative) -> tuple[Any, EmptyState]:
    r"""Scale all updates together so that their norm, as one vector, is at most `max_norm`.

    .. math:: u \leftarrow u \cdot \min\Bigl(1, \frac{c}{\lVert u \rVert_2 + 10^{-6}}\Bigr)

    Equal to `torch.nn.utils.clip_grad_norm_`, without changing the gradients. Under `purestep.optim.Optimizer` the norm
    is that of all parameter groups together. Gradients that are None do not count.

    Args:
        max_norm: :math:`c \ge 0`, the largest norm of all updates together.

    >>> import torch, purestep as ps
    >>> opt, params = ps.clip_by_global_norm(1.0), [torch.zeros(1), torch.zeros(1)]
    >>> opt.update([torch.tensor([3.0]), torch.tensor([4.0])], opt.init_state(params), params)[0]
    [tensor([0.6000]), tensor([0.8000])]

    Reference: Pascanu et al., `On the difficulty of training recurrent neural networks
    <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    return minimum(max_norm / (global_norm(us) + 1e-6), 1.0), s
