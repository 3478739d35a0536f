"""Weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from purestep._core.hyper import Hyper, NonNegative
from purestep.declare import leafwise
from purestep.transform import Transform
from purestep.transforms.mask import masked


@leafwise(off="weight_decay", name="add_decayed_weights")
def decay(u: Tensor, p: Tensor, weight_decay: NonNegative) -> Tensor:
    """`add_decayed_weights` on all parameters."""
    return u + weight_decay * p


def add_decayed_weights(weight_decay: Hyper, mask: Callable[[str, Tensor], bool] | Any = None) -> Transform:
    r"""Add the parameters times a number to the updates: :math:`u \leftarrow u + \lambda\,p`.

    Where it stands decides what it is. There are three usual places:

    A penalty
        before the moments (as in `adam`): :math:`\lambda p` is a part of the gradient, the gradient of
        :math:`\tfrac\lambda2 \lVert p \rVert_2^2`, and is rescaled with it.
    Decoupled
        between the moments and the learning rate (as in `adamw`): a step shrinks all parameters alike, by the share
        :math:`\eta_t \lambda`, which follows the learning rate's schedule.
    Independent
        behind the learning rate: the share is :math:`\lambda` itself, whatever the learning rate and its schedule, so that one
        can be tuned without the other. It is smaller by a factor of :math:`\eta`.

    Args:
        weight_decay: :math:`\lambda \ge 0`.
        mask: which parameters decay: a function `(path, param) -> bool`, or a pytree of bools shaped like the parameters.

    The three in turn, without any gradient, as the learning rate falls from 0.1 to 0.05 and to 0:

    >>> import torch, purestep as ps
    >>> lr = ps.schedules.linear(0.1, 0.0, total_steps=2)
    >>> recipes = {
    ...     "penalty": ps.chain(ps.add_decayed_weights(0.01), ps.scale_by_adam(), ps.scale_by_learning_rate(lr)),
    ...     "decoupled": ps.chain(ps.scale_by_adam(), ps.add_decayed_weights(0.01), ps.scale_by_learning_rate(lr)),
    ...     "independent": ps.chain(
    ...         ps.scale_by_adam(), ps.scale(lr), ps.add_decayed_weights(0.001), ps.scale_by_learning_rate(1.0)
    ...     ),
    ... }
    >>> for name, opt in recipes.items():
    ...     p = torch.tensor([10.0, 1.0])
    ...     state = opt.init_state(p)
    ...     for _ in range(3):
    ...         p, state = opt.step(torch.zeros(2), state, p)
    ...     print(name, [round(x, 4) for x in p.tolist()])
    penalty [9.85, 0.8502]
    decoupled [9.985, 0.9985]
    independent [9.97, 0.997]

    To Adam a penalty is a gradient like any other, so it moves 10 and 1 alike, by 0.15; the others shrink both by the same
    share. To follow the schedule, but not the size of the learning rate, as in Loshchilov & Hutter's paper, is
    ``chain(scale_by_adam(), scale(0.1), add_decayed_weights(0.001), scale_by_learning_rate(multiplier))``, where the schedule
    `multiplier` begins at 1.

    A mask keeps the decay to some of the parameters:

    >>> opt = ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 1)
    >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
    >>> grads = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
    >>> opt.update(grads, opt.init_state(params), params)[0]
    {'weight': tensor([[0.1000]]), 'bias': tensor([0.])}

    Reference: Loshchilov & Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2019.
    """
    return decay(weight_decay) if mask is None else masked(decay(weight_decay), mask)
