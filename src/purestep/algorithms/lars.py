"""LARS (You et al., 2017): momentum with a learning rate for each layer."""

from __future__ import annotations

from purestep._core.hyper import Hyper
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.decay import add_decayed_weights
from purestep.transforms.momentum import trace
from purestep.transforms.norms import scale_by_trust_ratio
from purestep.transforms.scale import direction, scale_by_learning_rate


def lars(
    lr: Hyper = 1.0,
    momentum: Hyper = 0.9,
    weight_decay: Hyper = 0.0,
    trust_coefficient: Hyper = 1e-3,
    eps: Hyper = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> Transform:
    r"""LARS: SGD with momentum, each parameter's step relative to its own norm. For very large batches.

    .. math::
        \hat g_t &= g_t + \lambda p_{t-1} \\
        b_t &= \mu\,b_{t-1} + \eta\,c\,\frac{\lVert p_{t-1} \rVert_2}{\lVert \hat g_t \rVert_2 + \epsilon}\,\hat g_t \\
        p_t &= p_{t-1} - b_t

    As in the paper, and unlike `sgd`, the learning rate stands inside the momentum buffer. The norm that is divided by is
    that of the gradient and the decay together, as in optax; the paper has
    :math:`\lVert g_t \rVert + \lambda \lVert p_{t-1} \rVert`, which is at least that. Where a parameter or its gradient is
    exactly 0, the ratio is 1.

    Biases and the parameters of normalizations are usually left to plain momentum, without decay: see the example.

    Args:
        lr: the learning rate :math:`\eta \ge 0`, to be multiplied by `trust_coefficient`.
        momentum: :math:`\mu \ge 0`; at 0 there is no momentum buffer.
        weight_decay: :math:`\lambda \ge 0`, an :math:`L_2` penalty.
        trust_coefficient: :math:`c \ge 0`, the length of a step relative to the parameter.
        eps: :math:`\epsilon \ge 0`, added to the norm of the gradient.
        nesterov: look ahead along the buffer.
        maximize: climb instead of descending.

    Raises:
        ValueError: a value out of its range.

    >>> import torch, purestep as ps
    >>> layers = lambda path, p: p.ndim > 1
    >>> rest = lambda path, p: p.ndim <= 1
    >>> opt = ps.chain(ps.masked(ps.lars(lr=1.0, trust_coefficient=0.1), layers), ps.masked(ps.sgd(lr=0.1), rest))
    >>> params = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.ones(1)}
    >>> grads = {"weight": torch.tensor([[0.0, 200.0]]), "bias": torch.ones(1)}
    >>> opt.step(grads, opt.init_state(params), params)[0]  # a tenth of the weight's norm, which is 5
    {'weight': tensor([[3.0000, 3.5000]]), 'bias': tensor([0.9000])}

    Reference: You et al., `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_, 2017.
    """
    ratio = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    momentum_ = trace(momentum, nesterov=nesterov)
    return chain(direction(maximize), add_decayed_weights(weight_decay), ratio, scale_by_learning_rate(lr), momentum_)
