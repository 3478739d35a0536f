"""Weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from purestep.hyper import Hyper, NonNegative
from purestep.transform import Transform, leafwise
from purestep.transforms.mask import masked


@leafwise(off="weight_decay", name="add_decayed_weights")
def decay(u: Tensor, p: Tensor, weight_decay: NonNegative) -> Tensor:
    """`add_decayed_weights` on all parameters."""
    return u + weight_decay * p


def add_decayed_weights(weight_decay: Hyper, mask: Callable[[str, Tensor], bool] | Any = None) -> Transform:
    r"""Add the parameters times a number to the updates: :math:`u \leftarrow u + \lambda\,p`.

    Where it stands decides what it is: before the moments it is an :math:`L_2` penalty (as in `adam`), between the moments
    and the learning rate it is decoupled weight decay (as in `adamw`), which is multiplied by the learning rate.

    Args:
        weight_decay: :math:`\lambda \ge 0`.
        mask: which parameters decay: a function `(path, param) -> bool`, or a pytree of bools shaped like the parameters.

    >>> import torch, purestep as ps
    >>> opt = ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 1)
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> grads = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    >>> opt.update(grads, opt.init_state(params), params)[0]
    {'weight': tensor([[0.1000]]), 'bias': tensor([0.])}

    Reference: Loshchilov & Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return decay(weight_decay) if mask is None else masked(decay(weight_decay), mask)
