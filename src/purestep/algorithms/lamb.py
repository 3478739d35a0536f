"""LAMB (You et al., 2020): Adam with a learning rate for each layer."""

from __future__ import annotations

from purestep._core.hyper import Betas, Hyper
from purestep.algorithms.adam import scale_by_adam
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.norms import scale_by_trust_ratio
from purestep.transforms.scale import direction, scale_by_learning_rate


def lamb(
    lr: Hyper = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Hyper = 1e-6,
    weight_decay: Hyper = 0.0,
    *,
    maximize: bool = False,
) -> Transform:
    r"""LAMB: AdamW, each parameter's step as long as the parameter itself. For very large batches.

    .. math::
        r_t &= \mathrm{adam}(g_t) + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta\,\frac{\lVert p_{t-1} \rVert_2}{\lVert r_t \rVert_2}\,r_t

    with :math:`\mathrm{adam}` as in `scale_by_adam`. Where a parameter or its step is exactly 0, the ratio is 1. The norm of
    the parameter is taken as it is (the paper's :math:`\phi(z) = z`), and the moments are unbiased, as in the paper's
    algorithm 2 and in optax; the paper's experiments on BERT did without that.

    Args:
        lr: the learning rate :math:`\eta \ge 0`: the length of a step relative to the parameter.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root; at least 0.
        weight_decay: :math:`\lambda \ge 0`, decoupled from the moments.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> opt, p = ps.lamb(lr=0.1), torch.tensor([6.0, 8.0])
    >>> opt.step(torch.tensor([0.1, -50.0]), opt.init_state(p), p)[0]  # Adam's direction, and a tenth of the norm of 10
    tensor([5.2929, 8.7071])

    Reference: You et al., `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
    <https://arxiv.org/abs/1904.00962>`_, 2020.
    """
    adam = scale_by_adam(betas=betas, eps=eps)
    return chain(
        direction(maximize), adam, add_decayed_weights(weight_decay), scale_by_trust_ratio(), scale_by_learning_rate(lr)
    )
